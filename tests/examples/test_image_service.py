"""The image service on SQLite: whole lives over HTTP, uploads cut and raced, ``kill -9``, its page in a browser."""

from __future__ import annotations

import hashlib
import html
import os
import random
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx
import pytest
from served import serving, until

DATA = random.Random(7).randbytes(2_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
RAW = {"disk_format": "raw"}
ADMIN = {"Authorization": "Bearer open sesame"}
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATIENCE = 30

pytestmark = pytest.mark.anyio


def service(place, **options):
    settings = {"IMAGES_DB": str(place / "images.db"), "IMAGES_ADMIN": "open sesame"}
    return serving(place, "image_service:app", settings, **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with service(tmp_path_factory.mktemp("service")) as server:
        yield server


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


@pytest.fixture
def image(client, request):
    """An image of the test's own, queued."""
    name = request.node.name.replace("[", ".").replace("]", "")
    answer = client.put(f"/images/{name}", json=RAW)
    assert (answer.status_code, answer.json()["status"]) == (201, "queued")
    return f"/images/{name}"


def status(client, image):
    return client.get(image).json()["status"]


def settled(client, image, *statuses):
    end = time.monotonic() + PATIENCE
    while (found := status(client, image)) not in statuses:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


class Body:
    """The body of an upload, which stops in the middle until the test lets it go on."""

    def __init__(self, end=None):
        self.sent = threading.Event()
        self.go = threading.Event()
        self.end = end

    def __iter__(self):
        yield DATA[:1_000_000]
        self.sent.set()
        assert self.go.wait(PATIENCE)
        if self.end is not None:
            raise self.end
        yield DATA[1_000_000:]


def test_a_whole_life(client, image, server):
    assert client.get(f"{image}/file").status_code == 404
    answer = client.put(f"{image}/file", content=DATA, params={"sha256": SHA256})
    assert answer.status_code == 200, answer.text
    known = answer.json()
    assert (known["status"], known["size"], known["digests"]) == ("active", len(DATA), {"sha256": SHA256})
    assert client.get(image).json() == known
    assert known in client.get("/images").json()
    assert str(server.folder) not in answer.text

    answer = client.get(f"{image}/file")
    assert (answer.status_code, answer.content == DATA, answer.headers["etag"]) == (200, True, f'"{SHA256}"')

    for action in ("deactivate", "reactivate"):
        assert client.post(f"{image}/{action}").status_code == 403
        assert client.post(f"{image}/{action}", headers={"Authorization": "Bearer no"}).status_code == 403
    assert client.post(f"{image}/deactivate", headers=ADMIN).json()["status"] == "deactivated"
    assert client.get(f"{image}/file").status_code == 403
    assert client.get(f"{image}/file", headers=ADMIN).content == DATA
    assert client.post(f"{image}/reactivate", headers=ADMIN).json()["status"] == "active"
    assert client.get(f"{image}/file").status_code == 200

    answer = client.delete(image)
    assert (answer.status_code, answer.json()["status"]) == (200, "deleted")
    assert client.get(f"{image}/file").status_code == 404
    assert image.rpartition("/")[2] not in server.stored()


@pytest.mark.parametrize(
    ("header", "start", "stop"), [("bytes=0-0", 0, 1), ("bytes=1999990-", 1_999_990, 2_000_000), ("bytes=-7", -7, None)]
)
def test_ranges(client, header, start, stop):
    if client.get("/images/ranges").status_code == 404:
        client.put("/images/ranges", json=RAW)
        client.put("/images/ranges/file", content=DATA)
    answer = client.get("/images/ranges/file", headers={"Range": header})
    assert (answer.status_code, answer.content) == (206, DATA[start:stop])
    assert client.get("/images/ranges/file", headers={"Range": "bytes=2000000-"}).status_code == 416


def test_what_is_refused(client, image, server):
    answers = {
        409: client.put(image, json=RAW),
        404: client.get("/images/none"),
        400: client.put(f"{image}/file", content=b"x", params={"sha256": "no"}),
    }
    assert {code: answer.status_code for code, answer in answers.items()} == {code: code for code in answers}
    assert client.put("/images/.hidden", json=RAW).status_code == 422
    assert client.put(f"{image}/file", content=b"x", params={"sha256": "0" * 64}).status_code == 422
    assert status(client, image) == "queued"
    client.put("/images/qcow2", json={"disk_format": "qcow2"})
    answer = client.put("/images/qcow2/file", content=DATA)
    assert (answer.status_code, answer.json()["error"]) == (422, "FormatMismatch")
    client.put("/images/kept", json=RAW | {"protected": True})
    assert client.delete("/images/kept").status_code == 403
    assert not server.held()


def test_an_upload_cut_in_the_middle(client, image, server):
    before = server.stored()
    body = Body(ConnectionAbortedError())
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(client.put, f"{image}/file", content=body)
        assert body.sent.wait(PATIENCE)
        settled(client, image, "saving")
        body.go.set()
        with pytest.raises(ConnectionAbortedError):
            upload.result(PATIENCE)
    settled(client, image, "queued")
    assert server.stored() == before
    assert not server.held()
    assert client.put(f"{image}/file", content=DATA).json()["digests"]["sha256"] == SHA256
    assert client.get(f"{image}/file").content == DATA


def test_two_uploads_racing_on_one_image(client, image):
    body = Body()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(client.put, f"{image}/file", content=body)
        assert body.sent.wait(PATIENCE)
        settled(client, image, "saving")
        answer = client.put(f"{image}/file", content=b"rival")
        assert (answer.status_code, answer.json()["error"]) == (409, "IllegalTransition")
        body.go.set()
        assert upload.result(PATIENCE).status_code == 200
    assert client.get(f"{image}/file").content == DATA


async def test_of_many_uploads_at_the_same_moment_one_wins(server, client, image):
    contents = [bytes([number]) * 300_000 for number in range(8)]
    answers = {}

    async def upload(number):
        answers[number] = (await racing.put(f"{image}/file", content=contents[number])).status_code

    racing = httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False)
    async with racing, anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(upload, number)
    (winner,) = [number for number, code in answers.items() if code == 200]
    assert {code for number, code in answers.items() if number != winner} == {409}
    assert client.get(f"{image}/file").content == contents[winner]


def test_deleting_what_is_being_uploaded(client, image, server):
    before = server.stored()
    body = Body()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(client.put, f"{image}/file", content=body)
        assert body.sent.wait(PATIENCE)
        settled(client, image, "saving")
        assert client.delete(image).status_code == 202
        body.go.set()
        assert upload.result(PATIENCE).status_code == 409
    settled(client, image, "deleted")
    assert server.stored() == before


@pytest.mark.parametrize("staging", ["auto", "named"])
def test_kill_9_during_an_upload(tmp_path, staging):
    with service(tmp_path, store=f"staging = {staging}\n") as server:
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            for name in ("debian", "ready"):
                client.put(f"/images/{name}", json=RAW)
            client.put("/images/ready/file", content=DATA)
            body = Body()
            with ThreadPoolExecutor(1) as pool:
                upload = pool.submit(client.put, "/images/debian/file", content=body)
                assert body.sent.wait(PATIENCE)
                settled(client, "/images/debian", "saving")
                server.kill()
                body.go.set()
                with pytest.raises(httpx.TransportError):
                    upload.result(PATIENCE)
        server.start()
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            settled(client, "/images/debian", "queued")
            assert {name for name in server.stored() if name[0] != "."} == {"ready"}
            assert client.get("/images/ready/file").content == DATA
            assert client.put("/images/debian/file", content=DATA).status_code == 200
            assert client.get("/images/debian/file").content == DATA


def test_kill_9_at_any_moment(tmp_path):
    """Around the end of uploads: after the restart each image is queued without data, or active with all of it."""
    contents = {f"i{number}": random.Random(number).randbytes(400_000) for number in range(8)}
    done = threading.Semaphore(0)

    def put(name):
        try:
            return client.put(f"/images/{name}/file", content=contents[name]).status_code
        except httpx.TransportError:
            return None
        finally:
            done.release()

    with service(tmp_path) as server:
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            for name in contents:
                assert client.put(f"/images/{name}", json=RAW).status_code == 201
            with ThreadPoolExecutor(len(contents)) as pool:
                uploads = {name: pool.submit(put, name) for name in contents}
                assert done.acquire(timeout=PATIENCE)
                server.kill()
            acknowledged = {name for name, upload in uploads.items() if upload.result(PATIENCE) == 200}
        server.start()
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            active = {name for name in contents if settled(client, f"/images/{name}", "queued", "active") == "active"}
            assert acknowledged <= active
            assert {name for name in server.stored() if name[0] != "."} == active
            for name in active:
                assert client.get(f"/images/{name}/file").content == contents[name]


# The page


def browser():
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None and os.environ.get("IMAGESTORE_REQUIRE_SERVERS") != "all":
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}")
    assert found is not None, f"no browser: install one of {', '.join(BROWSERS)}"
    return found


def seen(url, place):
    """What a browser made of a page, after its scripts have run, if it has any."""
    done = subprocess.run(
        [
            browser(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--no-proxy-server"),
            f"--user-data-dir={place}",
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "HOME": str(place)},
    )
    return done.stdout


def test_the_page_in_a_browser(client, server, tmp_path):
    evil = "<script>document.title=1</script>"
    for name, format_ in (("page-active", "bare"), ("page-gone", "bare"), ("page-evil", evil)):
        assert client.put(f"/images/{name}", json=RAW | {"container_format": format_}).status_code == 201
    client.put("/images/page-active/file", content=DATA)
    client.delete("/images/page-gone")
    body = Body()
    client.put("/images/page-saving", json=RAW)
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(client.put, "/images/page-saving/file", content=body)
        assert body.sent.wait(PATIENCE)
        settled(client, "/images/page-saving", "saving")
        dom = seen(server.url, tmp_path)
        body.go.set()
        upload.result(PATIENCE)
    rows = {row.partition('"')[0]: row for row in dom.split('<tr id="')[1:]}
    for name, shown in (("active", "active"), ("gone", "deleted"), ("evil", "queued"), ("saving", "saving")):
        assert f'<td class="{shown}">{shown}</td>' in rows[f"page-{name}"]
    assert f"<td>{SHA256[:12]}</td>" in rows["page-active"]
    assert '<td class="size">2,000,000</td>' in rows["page-active"]
    assert "<title>Images</title>" in dom
    assert html.escape(evil, quote=False) in rows["page-evil"]
    assert "<script" not in dom


async def test_a_reader_that_leaves_closes_the_image(server, client, image):
    assert client.put(f"{image}/file", content=bytes(range(256)) * (1 << 17)).status_code == 200
    leaving = httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False)
    async with leaving, leaving.stream("GET", f"{image}/file") as answer:
        async for _ in answer.aiter_raw(1000):
            assert server.held()
            break
    await until(lambda: not server.held())
