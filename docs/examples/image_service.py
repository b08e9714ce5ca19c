"""An image service that keeps its word: records in SQLite, data in stores, and a page that shows both.

Run it with ``IMAGES_CONF=images.conf IMAGES_DB=images.db uvicorn image_service:app``. One process is enough for
hundreds of clients; others may share database and stores if each has a name of its own in ``IMAGES_WORKER``. Whoever
sends the token of ``IMAGES_ADMIN`` (``Authorization: Bearer …``) is an administrator. Everybody else may do the rest:
a real service would ask who calls.
"""

# ruff: noqa: ARG001, D103, INP001 - what a function is for is said by its route, and a method by Repository

from __future__ import annotations

import asyncio
import html
import json
import logging
import os
import secrets
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import Body, Depends, FastAPI, HTTPException, Path, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi_images import STATUS, byte_range, failed

from imagestore import AlreadyExists, NotFound, Protected, StoreError, Stores, WrongStatus, aio, load_stores
from imagestore.image import Image, ImageStatus
from imagestore.lifecycle import Lifecycle, Record

log = logging.getLogger("uvicorn.error")

STATUS |= {WrongStatus: 409, Protected: 403}


class SqliteRepository:
    """Records as JSON in one table; SQLite sees to it that of two changes of one revision only one finds it."""

    def __init__(self, path: str) -> None:
        self.path = path
        with self.database() as database:
            database.execute("PRAGMA journal_mode = wal")
            database.execute(
                "CREATE TABLE IF NOT EXISTS images "
                "(id TEXT PRIMARY KEY, status TEXT NOT NULL, revision INTEGER NOT NULL, record TEXT NOT NULL)"
            )
            database.execute("CREATE INDEX IF NOT EXISTS images_status ON images (status)")

    @contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction: calls come from many threads."""
        with closing(sqlite3.connect(self.path, timeout=30)) as database, database:
            yield database

    def get(self, image_id: str, /) -> Record:
        with self.database() as database:
            row = database.execute("SELECT record FROM images WHERE id = ?", (image_id,)).fetchone()
        if row is None:
            raise NotFound("no image of that id", image_id=image_id)
        return Record.from_dict(json.loads(row[0]))

    def create(self, record: Record, /) -> None:
        try:
            with self.database() as database:
                database.execute("INSERT INTO images VALUES (:id, :status, :revision, :record)", self.row(record))
        except sqlite3.IntegrityError:
            raise AlreadyExists("there is an image of that id", image_id=record.image.id) from None

    def compare_and_swap(self, old: Record, new: Record, /) -> bool:
        with self.database() as database:
            return bool(
                database.execute(
                    "UPDATE images SET status = :status, revision = :revision, record = :record "
                    "WHERE id = :id AND revision = :old",
                    self.row(new) | {"old": old.revision},
                ).rowcount
            )

    def list_by_status(self, *statuses: ImageStatus) -> list[Record]:
        marks = ", ".join("?" * len(statuses))
        with self.database() as database:
            rows = database.execute(
                f"SELECT record FROM images WHERE status IN ({marks}) ORDER BY id",  # noqa: S608 - marks only
                statuses,
            ).fetchall()
        return [Record.from_dict(json.loads(row[0])) for row in rows]

    @staticmethod
    def row(record: Record) -> dict[str, Any]:
        text = json.dumps(record.to_dict())
        return {"id": record.image.id, "status": record.image.status, "revision": record.revision, "record": text}


def care(lifecycle: Lifecycle[Any], stores: Stores) -> None:
    """Put right what dead processes left: images, deleted data, unfinished uploads."""
    for result in (*lifecycle.recover(), *lifecycle.scrub()):
        log.info("image %s is %s now%s", result.image.id, result.image.status, f": {result.error}" * bool(result.error))
    for store in stores.values():
        if store.supports("discard"):
            store.collect()


async def keep_caring(lifecycle: Lifecycle[Any], stores: Stores) -> None:
    while True:
        try:
            await run_sync(care, lifecycle, stores)
        except (StoreError, sqlite3.Error):
            log.exception("what is left will be seen to later")
        await asyncio.sleep(60)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    stores = load_stores(os.environ["IMAGES_CONF"])
    repository = SqliteRepository(os.environ["IMAGES_DB"])
    lifecycle = Lifecycle(stores, repository, worker=os.environ.get("IMAGES_WORKER", "image-service"))
    caring = asyncio.create_task(keep_caring(lifecycle, stores))
    try:
        yield {"lifecycle": lifecycle, "repository": repository}
    finally:
        caring.cancel()
        await asyncio.wait([caring])
        await run_sync(stores.close)


app = FastAPI(title="Images", lifespan=lifespan)
app.exception_handler(StoreError)(failed)

ImageId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


async def the_lifecycle(request: Request) -> Lifecycle[Any]:
    lifecycle: Lifecycle[Any] = request.state.lifecycle
    return lifecycle


async def is_administrator(request: Request) -> bool:
    token, sent = os.environ.get("IMAGES_ADMIN", ""), request.headers.get("authorization", "")
    return bool(token) and secrets.compare_digest(sent.encode(), f"Bearer {token}".encode())


async def must_be_administrator(administrator: Annotated[bool, Depends(is_administrator)]) -> None:
    if not administrator:
        raise HTTPException(403, "only an administrator may do that")


Images = Annotated[Lifecycle[Any], Depends(the_lifecycle)]
Administrator = Annotated[bool, Depends(is_administrator)]


def shown(image: Image) -> dict[str, Any]:
    values: dict[str, Any] = Record(image=image).to_dict()["image"]
    del values["locations"]  # where images are kept is nothing to clients
    return values


@app.put("/images/{image_id}", status_code=201)
async def create(
    image_id: ImageId,
    images: Images,
    disk_format: Annotated[str, Body(max_length=40)],
    container_format: Annotated[str, Body(max_length=40)] = "bare",
    *,
    protected: Annotated[bool, Body()] = False,
) -> dict[str, Any]:
    image = Image(id=image_id, disk_format=disk_format, container_format=container_format, protected=protected)
    return shown(await run_sync(images.create, image))


@app.get("/images")
async def index(request: Request) -> list[dict[str, Any]]:
    records = await run_sync(lambda: request.state.repository.list_by_status(*ImageStatus))
    return [shown(record.image) for record in records]


@app.get("/images/{image_id}")
async def show(image_id: ImageId, images: Images) -> dict[str, Any]:
    return shown(await run_sync(images.get, image_id))


@app.put("/images/{image_id}/file")
async def upload(image_id: ImageId, request: Request, images: Images, sha256: str | None = None) -> dict[str, Any]:
    length = request.headers.get("content-length")
    image = await aio.transfer(
        images.upload,
        image_id,
        aio.source(request.stream()),
        size=None if length is None else int(length),
        expected=None if sha256 is None else {"sha256": sha256},
    )
    return shown(image)


async def opened(
    image_id: ImageId, request: Request, images: Images, administrator: Administrator
) -> AsyncIterator[StreamingResponse]:
    image = await run_sync(images.get, image_id)
    if not image.readable(administrator=administrator):
        raise HTTPException(403 if image.status == "deactivated" else 404, f"the image is {image.status}")
    assert image.size is not None
    # Data never changes, so its digest names it.
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{image.digests["sha256"]}"'}
    start, stop, status = 0, image.size, 200
    if wanted := byte_range(request.headers, image.size, headers["ETag"]):
        (start, stop), status = wanted, 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{image.size}"
    async with aio.open(images.open, image_id, start=start, stop=stop, administrator=administrator) as data:
        headers["Content-Length"] = str(data.size)
        yield StreamingResponse(data, status, headers, media_type="application/octet-stream")


@app.get("/images/{image_id}/file", response_class=StreamingResponse)
async def download(answer: Annotated[StreamingResponse, Depends(opened)]) -> StreamingResponse:
    return answer


@app.post("/images/{image_id}/deactivate", dependencies=[Depends(must_be_administrator)])
async def deactivate(image_id: ImageId, images: Images) -> dict[str, Any]:
    return shown(await run_sync(images.deactivate, image_id))


@app.post("/images/{image_id}/reactivate", dependencies=[Depends(must_be_administrator)])
async def reactivate(image_id: ImageId, images: Images) -> dict[str, Any]:
    return shown(await run_sync(images.reactivate, image_id))


@app.delete("/images/{image_id}")
async def delete(image_id: ImageId, images: Images) -> JSONResponse:
    """202: what is left of it will be removed later."""
    image = await run_sync(partial(images.delete, image_id))
    return JSONResponse(shown(image), 200 if image.status == "deleted" else 202)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="refresh" content="5">
<title>Images</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .4rem .8rem .4rem 0; text-align: left; }}
td.size {{ text-align: right; font-variant-numeric: tabular-nums; }}
.active {{ color: #06602b; }} .deactivated, .killed {{ color: #9b1c1c; }} .deleted {{ color: #666; }}
</style>
</head>
<body>
<h1>Images</h1>
<table>
<thead><tr><th>Image<th>Status<th>Format<th>Size in bytes<th>SHA-256<th>Changed</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""


@app.get("/", response_class=HTMLResponse)
async def page(request: Request) -> HTMLResponse:
    rows = []
    for image in await index(request):
        cells = [
            f"<td>{html.escape(image['id'])}",
            f'<td class="{image["status"]}">{image["status"]}',
            f"<td>{html.escape(image['disk_format'])}, {html.escape(image['container_format'])}",
            f'<td class="size">{"" if image["size"] is None else format(image["size"], ",")}',
            f"<td>{image['digests'].get('sha256', '')[:12]}",
            f"<td>{image['updated_at'][:19].replace('T', ' ')}",
        ]
        rows.append(f'<tr id="{html.escape(image["id"])}">{"".join(cells)}</tr>')
    policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return HTMLResponse(PAGE.format(rows="\n".join(rows)), headers=policy)
