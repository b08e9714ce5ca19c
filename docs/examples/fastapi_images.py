"""An image service over HTTP in one file: PUT, GET (ranges too) and DELETE of ``/images/{id}``.

Run it with ``IMAGES_CONF=images.conf uvicorn fastapi_images:app``. It has no users and no database: a real service
would ask who calls, and would keep the location that `add` returns instead of looking for it by id: see
image_service.py.
"""

# ruff: noqa: ARG001, D103, INP001 - FastAPI passes what a signature asks for, and a server finds the file by name

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse

from imagestore import Stat, Store, aio, errors, load_stores

# The nearest class of an error counts. What is not here is the service's own fault: 500.
STATUS = {
    errors.InvalidRequest: 400,
    errors.SourceError: 400,
    errors.NotFound: 404,
    errors.AlreadyExists: 409,
    errors.InUse: 409,
    errors.Changed: 409,
    errors.LimitExceeded: 413,
    errors.IntegrityError: 422,
    errors.FormatError: 422,
    errors.AccessError: 502,
    errors.Unavailable: 503,
    errors.StoreFull: 507,
}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    stores = load_stores(os.environ["IMAGES_CONF"])
    try:
        yield {"store": stores.default}
    finally:
        await run_sync(stores.close)


app = FastAPI(title="Images", lifespan=lifespan)


async def the_store(request: Request) -> Store:
    store: Store = request.state.store
    return store


Images = Annotated[Store, Depends(the_store)]


@app.exception_handler(errors.StoreError)
async def failed(request: Request, error: errors.StoreError) -> JSONResponse:
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    wait = None if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    # The message, not the whole text: where images are kept is nothing to the client.
    return JSONResponse({"error": type(error).__name__, "detail": error.message}, status, wait)


@app.put("/images/{image_id}", status_code=201)
async def put(image_id: str, request: Request, store: Images, sha256: str | None = None) -> dict[str, Any]:
    """Store the body of the request, whole or not at all; with ``?sha256=`` only if that is its digest."""
    length = request.headers.get("content-length")
    added = await aio.transfer(
        store.add,
        image_id,
        aio.source(request.stream()),
        size=None if length is None else int(length),
        expected=None if sha256 is None else {"sha256": sha256},
    )
    return {"id": added.image_id, "size": added.size, "sha256": added.digests["sha256"]}


async def opened(image_id: str, request: Request, store: Images) -> AsyncIterator[StreamingResponse]:
    location = await run_sync(store.locate, image_id)
    stat = await run_sync(store.stat, location)
    headers = {"Accept-Ranges": "bytes", "ETag": etag(stat)}
    start, stop, status = 0, stat.size, 200
    if wanted := byte_range(request.headers, stat.size, etag(stat)):
        (start, stop), status = wanted, 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{stat.size}"
    async with aio.open(store.get, location, start=start, stop=stop) as image:
        if image.stat.version != stat.version:
            raise errors.Changed("the image was replaced just now")
        headers["Content-Length"] = str(image.size)
        # FastAPI comes back here after the response was sent, or could not be: the image is closed in any case.
        yield StreamingResponse(image, status, headers, media_type="application/octet-stream")


@app.get("/images/{image_id}", response_class=StreamingResponse)
async def get(answer: Annotated[StreamingResponse, Depends(opened)]) -> StreamingResponse:
    """The image, or the part of it that ``Range`` names."""
    return answer


@app.delete("/images/{image_id}", status_code=204)
async def delete(image_id: str, store: Images) -> None:
    await run_sync(store.delete, await run_sync(store.locate, image_id))


def etag(stat: Stat) -> str:
    return f'"{hashlib.sha256(f"{stat.version} {stat.size}".encode()).hexdigest()[:32]}"'


def byte_range(headers: Mapping[str, str], size: int, tag: str) -> tuple[int, int] | None:
    """The one range that is asked for, as (start, stop); None: the whole image (RFC 9110, section 14.2)."""
    found = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", headers.get("range", ""))
    if not found or found[0] == "bytes=-" or headers.get("if-range", tag) != tag:
        return None
    first, last = found.groups()
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise HTTPException(416, headers={"Content-Range": f"bytes */{size}"})
    return start, stop
