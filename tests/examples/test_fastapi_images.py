"""The example service under a real server on loopback, with real clients."""

from __future__ import annotations

import hashlib
import random
import time

import anyio
import httpx
import pytest
from served import serving, until

DATA = random.Random(5).randbytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
MIB = 1 << 20

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("service")) as server:
        yield server


@pytest.fixture
def server(running):
    yield running
    for path in running.folder.iterdir():
        path.unlink()


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
        yield client


def test_in_and_out(client, server):
    answer = client.put("/images/debian", content=DATA)
    assert (answer.status_code, answer.json()) == (201, {"id": "debian", "size": len(DATA), "sha256": SHA256})
    answer = client.get("/images/debian")
    assert answer.status_code == 200
    assert answer.content == DATA
    assert answer.headers["content-length"] == str(len(DATA))
    assert answer.headers["accept-ranges"] == "bytes"
    assert client.delete("/images/debian").status_code == 204
    assert client.get("/images/debian").status_code == 404
    assert not server.stored()


def test_a_stream_of_unknown_length(client):
    pieces = (DATA[at : at + 100_000] for at in range(0, len(DATA), 100_000))
    answer = client.put("/images/debian", content=pieces, params={"sha256": SHA256})
    assert (answer.status_code, answer.json()["size"]) == (201, len(DATA))


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=2999999-", 2_999_999, 3_000_000),
        ("bytes=2999000-9999999", 2_999_000, 3_000_000),
        ("bytes=-5", 2_999_995, 3_000_000),
        ("bytes=-9999999", 0, 3_000_000),
    ],
)
def test_ranges(client, header, start, stop):
    client.put("/images/debian", content=DATA)
    answer = client.get("/images/debian", headers={"Range": header})
    assert answer.status_code == 206
    assert answer.content == DATA[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(DATA)}"
    assert answer.headers["content-length"] == str(stop - start)


def test_ranges_that_are_none(client):
    client.put("/images/debian", content=DATA)
    for header in ("bytes=3000000-", "bytes=-0"):
        answer = client.get("/images/debian", headers={"Range": header})
        assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */3000000")
    for header in ("bytes=5-2", "bytes=-", "bytes=0-1,5-6", "lines=1-2", "bytes=x-y"):
        assert client.get("/images/debian", headers={"Range": header}).status_code == 200


def test_a_range_of_another_image_is_not_mixed_in(client):
    client.put("/images/debian", content=DATA)
    tag = client.get("/images/debian", headers={"Range": "bytes=0-9"}).headers["etag"]
    resumed = {"Range": "bytes=10-19", "If-Range": tag}
    assert client.get("/images/debian", headers=resumed).status_code == 206
    client.delete("/images/debian")
    client.put("/images/debian", content=DATA[::-1])
    answer = client.get("/images/debian", headers=resumed)
    assert (answer.status_code, answer.content) == (200, DATA[::-1])


def test_an_empty_image(client):
    assert client.put("/images/empty", content=b"").json()["size"] == 0
    answer = client.get("/images/empty")
    assert (answer.status_code, answer.content) == (200, b"")
    assert client.get("/images/empty", headers={"Range": "bytes=0-"}).status_code == 416


def test_errors(client, server):
    client.put("/images/debian", content=b"first")
    for answer, status, kind in (
        (client.put("/images/debian", content=b"second"), 409, "AlreadyExists"),
        (client.put("/images/other", content=b"x", params={"sha256": "0" * 64}), 422, "DigestMismatch"),
        (client.put("/images/other", content=b"x", params={"sha256": "no"}), 400, "InvalidRequest"),
        (client.put("/images/.hidden", content=b"x"), 400, "InvalidImageId"),
        (client.get("/images/none"), 404, "NotFound"),
        (client.delete("/images/none"), 404, "NotFound"),
    ):
        assert (answer.status_code, answer.json()["error"]) == (status, kind)
        assert str(server.folder) not in answer.text
    assert client.get("/images/debian").content == b"first"
    assert server.stored() == {"debian"}


async def test_a_reader_that_leaves_closes_the_image(server):
    async with httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as client:
        (await client.put("/images/large", content=bytes(range(256)) * (1 << 17))).raise_for_status()
        async with client.stream("GET", "/images/large") as answer:
            async for _ in answer.aiter_raw(1000):
                assert server.held()
                break
    await until(lambda: not server.held())


async def test_a_hundred_uploads_at_once_some_cut(tmp_path):
    """A hundred streams of 8 MiB are under way together; every fifth is cut after half of it."""
    count, piece, pieces = 100, 128 * 1024, 64
    seeds = [random.Random(number).randbytes(piece) for number in range(count)]
    cut = {f"i{number}" for number in range(0, count, 5)}
    halfway = 0
    everybody = anyio.Event()
    digests = {}

    with serving(tmp_path, memory_total=64 * MIB, workers=4) as server:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=server.url, timeout=90, limits=limits, trust_env=False) as client:
            (await client.put("/images/first", content=DATA)).raise_for_status()
            before = server.status("VmHWM")

            async def body(number):
                nonlocal halfway
                yield seeds[number]
                # Nobody goes on before everybody has begun.
                halfway += 1
                if halfway == count:
                    everybody.set()
                await everybody.wait()
                for at in range(1, pieces):
                    if f"i{number}" in cut and at == pieces // 2:
                        raise ConnectionAbortedError
                    yield seeds[number]

            async def upload(number):
                try:
                    answer = await client.put(f"/images/i{number}", content=body(number))
                except ConnectionAbortedError:
                    return
                answer.raise_for_status()
                digests[f"i{number}"] = answer.json()["sha256"]

            began = time.monotonic()
            async with anyio.create_task_group() as group:
                for number in range(count):
                    group.start_soon(upload, number)
                with anyio.move_on_after(90):
                    await everybody.wait()
            seconds = time.monotonic() - began
            await until(lambda: not server.held())
            memory, threads = server.status("VmHWM") - before, server.status("Threads")

        whole = {f"i{number}": hashlib.sha256(seeds[number] * pieces).hexdigest() for number in range(count)}
        assert digests == {name: digest for name, digest in whole.items() if name not in cut}
        assert server.stored() == {"first", *digests}
        for name, digest in digests.items():
            assert hashlib.sha256((server.folder / name).read_bytes()).hexdigest() == digest
        print(f"{count} uploads: {seconds:.1f} s, {memory / MIB:.0f} MiB more, {threads} threads")
        # The budget, and what is on its way: up to half a MiB of each upload in the server, and a thread's stack.
        assert memory < 128 * MIB
        assert threads < 150
