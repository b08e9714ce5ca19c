from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import hashlib
import random
import subprocess
import sys
import threading
import time
import traceback
import weakref
from functools import partial

import anyio
import anyio.to_thread
import pytest
from fake import fake_store

from imagestore import aio, open_store
from imagestore._models import Limits
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    DigestMismatch,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    SignatureMismatch,
    SourceError,
)

pytestmark = pytest.mark.anyio

DATA = random.Random(11).randbytes(10_500)
MUCH = DATA * 30  # more than a source collects
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


@pytest.fixture
def pair():
    store, backend = fake_store()
    with store:
        yield store, backend
    assert store._engine.budget.used == 0


@pytest.fixture(autouse=True)
def bounded():
    """A deadlock must not stop the whole run: it ends it, and shows where every thread stands."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
async def nothing_left(anyio_backend):
    yield
    assert aio.transfer_limiter().borrowed_tokens == 0
    assert aio.read_limiter().borrowed_tokens == 0


async def pieces(data=DATA, length=700):
    for at in range(0, len(data), length):
        await anyio.lowlevel.checkpoint()
        yield data[at : at + length]


async def silent(first=b"x" * 2500, started=None):
    """Gives something, and then nothing for ever."""
    yield first
    if started is not None:
        started.set()
    await anyio.sleep_forever()


async def until(condition):
    with anyio.fail_after(15):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other threads
            await anyio.sleep(0.005)


async def add(store, stream, **kwargs):
    async with contextlib.aclosing(stream):
        return await aio.transfer(store.add, "i", aio.source(stream), **kwargs)


async def read_all(store, **kwargs):
    async with aio.open(store.get, "fake://host/i", **kwargs) as image:
        return b"".join([chunk async for chunk in image])


class Gate:
    """Stops the backend's thread at one step of its script until the test lets it go on."""

    def __init__(self):
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.open.wait(15)


async def test_in_and_out(pair):
    store, backend = pair
    added = await aio.transfer(store.add, "image-1", aio.source(pieces()), size=len(DATA), digests=("sha256", "md5"))
    assert added.size == len(DATA)
    assert added.digests == {"sha256": SHA256, "md5": hashlib.md5(DATA).hexdigest()}
    async with aio.open(store.get, added.location, expected=added.digests) as image:
        assert image.size == image.stat.size == len(DATA)
        assert b"".join([chunk async for chunk in image]) == DATA
        with pytest.raises(StopAsyncIteration):
            await anext(image)
    async with aio.open(store.get, added.location, start=5, stop=2000) as image:
        assert image.size == 1995
        assert b"".join([chunk async for chunk in image]) == DATA[5:2000]
    checked = await aio.transfer(store.verify, added.location)
    assert checked.digests == {"sha256": SHA256}
    assert backend.count("closed") == backend.count("read")


@pytest.mark.parametrize("length", [1, 700, 10_500, 1 << 20])
async def test_pieces_of_any_length(pair, length):
    store, _ = pair
    data = DATA[:50] if length == 1 else DATA * 80
    added = await aio.transfer(store.add, "i", aio.source(pieces(data, length)))
    assert added.digests["sha256"] == hashlib.sha256(data).hexdigest()


async def test_an_empty_stream_and_empty_pieces(pair):
    store, backend = pair
    assert (await aio.transfer(store.add, "none", aio.source(pieces(b"")))).size == 0

    async def gaps():
        for chunk in (b"", b"a", b"", b"", b"b", b""):
            yield chunk

    assert (await aio.transfer(store.add, "gaps", aio.source(gaps()))).size == 2
    assert backend.images["gaps"][1] == b"ab"
    async with aio.open(store.get, "fake://host/none") as image:
        assert [chunk async for chunk in image] == []


async def test_anything_async_iterable_is_a_source(pair):
    store, _ = pair
    send, receive = anyio.create_memory_object_stream[bytes](1)

    async def produce():
        async with send:
            async for piece in pieces():
                await send.send(piece)

    async with anyio.create_task_group() as group, receive:
        group.start_soon(produce)
        added = await aio.transfer(store.add, "i", aio.source(receive))
    assert added.digests["sha256"] == SHA256


async def test_a_source_that_fails_is_the_cause(pair):
    store, backend = pair

    async def broken():
        yield DATA
        raise ConnectionResetError("the client went away")

    with pytest.raises(SourceError, match="the client went away") as caught:
        await aio.transfer(store.add, "i", aio.source(broken()))
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert not backend.images
    assert not backend.pending


async def test_errors_come_unchanged(pair):
    store, backend = pair
    await aio.transfer(store.add, "i", DATA)
    with pytest.raises(AlreadyExists) as caught:
        await aio.transfer(store.add, "i", aio.source(pieces()))
    assert (caught.value.store, caught.value.operation) == ("s", "add")
    with pytest.raises(NotFound):
        async with aio.open(store.get, "fake://host/none"):
            raise AssertionError("was opened")
    with pytest.raises(DigestMismatch):
        await read_all(store, expected={"md5": "0" * 32})
    denied = PermissionDenied("no")
    backend.script["chunk"] = [None, denied]
    with pytest.raises(PermissionDenied) as caught:
        await read_all(store)
    assert caught.value is denied
    with pytest.raises(LookupError, match="the host's own"):
        async with aio.open(store.get, "fake://host/i"):
            raise LookupError("the host's own")
    assert backend.count("closed") == backend.count("read") - 1  # one was not found


async def test_an_error_keeps_nothing_alive(pair):
    """What a failed transfer held hangs on the error's traceback, and goes with it."""
    store, _ = pair

    class Verifier:
        def update(self, data):
            pass

        def verify(self):
            raise ValueError

    async def fail():
        verifier = Verifier()
        alive.append(weakref.ref(verifier))
        with contextlib.suppress(SignatureMismatch):
            await aio.transfer(store.add, "i", aio.source(pieces()), verifier=verifier)

    alive = []
    gc.collect()
    gc.disable()
    try:
        await fail()
        await until(lambda: alive[0]() is None)
    finally:
        gc.enable()


async def test_a_kept_error_keeps_no_blocks(pair):
    store, backend = pair
    backend.script["write"] = [PermissionDenied("no")]
    with pytest.raises(PermissionDenied) as caught:
        await add(store, pieces())
    inside = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__) if "_transfer" in str(frame.f_code)]
    assert inside
    assert not any(frame.f_locals for frame in inside)


async def test_a_source_outside_of_a_worker_thread_is_refused(pair):
    store, backend = pair
    with pytest.raises(SourceError, match="worker thread"):
        store.add("i", aio.source(pieces()))
    assert not backend.pending


async def test_a_bare_async_iterable_is_refused_with_the_way_out(pair):
    store, _ = pair
    with pytest.raises(InvalidRequest, match=r"imagestore\.aio\.source"):
        await aio.transfer(store.add, "i", pieces())


# Cancellation


@pytest.mark.parametrize("size", [None, 100_000])
async def test_cancelled_while_the_stream_is_silent(pair, size):
    store, backend = pair
    started = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(partial(aio.transfer, store.add, "i", aio.source(silent(started=started)), size=size))
        await started.wait()
        began = time.monotonic()
        group.cancel_scope.cancel()
    assert time.monotonic() - began < 5
    assert not backend.images
    assert not backend.pending
    assert backend.count("abort") == 1


async def test_cancelled_while_the_backend_writes(pair):
    store, backend = pair
    gate = Gate()
    backend.script["write"] = [None, gate]
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(add, store, silent(MUCH))
            await until(gate.reached.is_set)
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
                # A write is not broken off: the transfer is waited for.
                assert aio.transfer_limiter().borrowed_tokens == 1
                gate.open.set()
    assert scope.cancelled_caught
    assert not backend.images
    assert not backend.pending


async def test_cancelled_with_a_source_that_never_waits(pair):
    store, backend = pair
    gate = Gate()
    backend.script["write"] = [gate]
    async with anyio.create_task_group() as group:
        group.start_soon(aio.transfer, store.add, "i", MUCH)
        await until(gate.reached.is_set)
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.05)
        gate.open.set()
    assert not backend.images
    assert not backend.pending


async def test_a_read_begun_after_the_cancellation_does_not_wait(pair):
    store, backend = pair
    gate = Gate()
    backend.script["create"] = [gate]
    asked = []

    async def stream():
        asked.append(True)
        await anyio.sleep_forever()
        yield b""

    async with anyio.create_task_group() as group:
        group.start_soon(partial(aio.transfer, store.add, "i", aio.source(stream())))
        await until(gate.reached.is_set)
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.05)
        gate.open.set()
    assert not asked
    assert not backend.pending


async def test_cancelled_in_line_does_not_begin(pair):
    store, backend = pair
    limiter = aio.transfer_limiter()
    limiter.total_tokens = 1
    try:
        async with anyio.create_task_group() as group:
            started = anyio.Event()
            group.start_soon(partial(aio.transfer, store.add, "a", aio.source(silent(started=started))))
            await started.wait()
            with anyio.move_on_after(0.05) as scope:
                await aio.transfer(store.add, "b", DATA)
            assert scope.cancelled_caught
            assert backend.count("create") == 1
            group.cancel_scope.cancel()
    finally:
        limiter.total_tokens = aio.TRANSFERS
    assert not backend.pending


async def test_a_commit_that_has_begun_is_not_broken_off(pair):
    store, backend = pair
    gate = Gate()
    backend.script["commit"] = [gate]
    async with anyio.create_task_group() as group:
        group.start_soon(partial(aio.transfer, store.add, "i", aio.source(pieces())))
        await until(gate.reached.is_set)
        group.cancel_scope.cancel()
        gate.open.set()
    assert backend.images["i"][1] == DATA
    assert not backend.pending


async def test_the_caller_may_cancel_by_event_too(pair):
    store, backend = pair
    cancel = threading.Event()
    gate = Gate()
    backend.script["write"] = [gate]

    async def stream():
        yield MUCH
        await until(gate.reached.is_set)
        cancel.set()
        gate.open.set()
        yield MUCH

    with pytest.raises(Cancelled):
        await add(store, stream(), cancel=cancel)
    assert not backend.pending


async def test_cancelled_while_reading(pair):
    store, backend = pair
    await aio.transfer(store.add, "i", DATA)
    gate = Gate()
    backend.script["chunk"] = [None, gate]

    async with anyio.create_task_group() as group:
        group.start_soon(read_all, store)
        await until(gate.reached.is_set)
        group.cancel_scope.cancel()
        gate.open.set()
    assert backend.count("closed") == backend.count("read") == 1


async def test_cancelled_between_two_reads(pair):
    store, backend = pair
    await aio.transfer(store.add, "i", DATA)
    with anyio.CancelScope() as scope:
        async with aio.open(store.get, "fake://host/i"):
            scope.cancel()
            await anyio.sleep_forever()
    assert backend.count("closed") == backend.count("read") == 1


async def test_cancelled_while_opening(pair):
    store, backend = pair
    await aio.transfer(store.add, "i", DATA)
    gate = Gate()
    backend.script["read"] = [gate]

    async def read():
        async with aio.open(store.get, "fake://host/i"):
            raise AssertionError("was opened")

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await until(gate.reached.is_set)
        group.cancel_scope.cancel()
        gate.open.set()
    assert backend.count("closed") == backend.count("read") == 1


async def test_left_early_the_connection_is_closed(pair):
    store, backend = pair
    backend.images["i"] = ("", DATA * 200)
    async with aio.open(store.get, "fake://host/i") as image:
        assert await anext(image)
    assert backend.count("closed") == 1

    async def body():
        async with aio.open(store.get, "fake://host/i") as image:
            async for chunk in image:
                yield chunk

    stream = body()
    assert await anext(stream)
    await stream.aclose()
    assert backend.count("closed") == 2


async def test_one_task_reads_an_image(pair):
    store, backend = pair
    await aio.transfer(store.add, "i", DATA)
    gate = Gate()
    backend.script["chunk"] = [gate]
    async with aio.open(store.get, "fake://host/i") as image, anyio.create_task_group() as group:
        group.start_soon(anext, image)
        await until(gate.reached.is_set)
        with pytest.raises(anyio.BusyResourceError):
            await anext(image)
        gate.open.set()


async def test_the_look_ahead_is_bounded(pair):
    store, backend = pair
    backend.images["i"] = ("", DATA * 300)
    async with aio.open(store.get, "fake://host/i") as image:
        assert backend.count("chunk") == 0
        await anext(image)
        assert aio.AHEAD <= backend.count("chunk") * 1000 <= aio.AHEAD + 1000


async def test_a_slow_backend_is_not_waited_for(pair, monkeypatch):
    store, backend = pair
    await aio.transfer(store.add, "i", DATA)
    monkeypatch.setattr(aio, "PATIENCE", 0.0)
    async with aio.open(store.get, "fake://host/i") as image:
        await anext(image)
        assert backend.count("chunk") == 1


# asyncio's own ways to cancel know nothing of shields.


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("way", ["cancel", "twice", "timeout", "wait_for", "group"])
async def test_asyncio_cancels_natively(pair, way):
    store, backend = pair
    gate = Gate()
    backend.script["write"] = [gate]
    call = add(store, silent(MUCH))

    async def let_go():
        await until(gate.reached.is_set)
        await asyncio.sleep(0.15)
        gate.open.set()

    helper = asyncio.create_task(let_go())
    if way in {"cancel", "twice"}:
        task = asyncio.create_task(call)
        await until(gate.reached.is_set)
        task.cancel()
        if way == "twice":
            await asyncio.sleep(0.05)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif way == "timeout":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await call
    elif way == "wait_for":
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call, 0.1)
    else:
        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                task = group.create_task(call)
                await until(gate.reached.is_set)
                raise LookupError
        assert task.cancelled()
    # When the task has ended, so has the transfer.
    assert backend.count("abort") == 1
    assert not backend.images
    assert not backend.pending
    await helper


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncio_cancels_a_reader_natively(pair):
    store, backend = pair
    await aio.transfer(store.add, "i", DATA)
    for step in ("read", "chunk"):
        gate = Gate()
        backend.script[step] = [gate]

        task = asyncio.create_task(read_all(store))
        await until(gate.reached.is_set)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert backend.count("closed") == backend.count("read") == 2


# Many at once


async def test_streams_that_need_threads_themselves_do_not_deadlock(tmp_path):
    """More uploads than threads, whose streams need the limiter that all the host's code shares."""
    default = anyio.to_thread.current_default_thread_limiter()
    before = default.total_tokens
    default.total_tokens = 2
    limits = Limits(workers=2, memory_total=1 << 20)
    results = {}
    path = tmp_path / "source"
    path.write_bytes(DATA * 3)

    async def file():
        async with await anyio.open_file(path, "rb") as stream:
            while chunk := await stream.read(9000):
                yield chunk

    store, backend = fake_store(limits=limits)
    with store:

        async def add(image_id):
            results[image_id] = await aio.transfer(store.add, image_id, aio.source(file()))

        try:
            async with anyio.create_task_group() as group:
                for number in range(100):
                    group.start_soon(add, f"i{number}")
        finally:
            default.total_tokens = before
    assert {result.digests["sha256"] for result in results.values()} == {hashlib.sha256(DATA * 3).hexdigest()}
    assert len(backend.images) == 100
    assert store._engine.budget.peak <= 1 << 20


async def test_from_store_to_store_with_one_thread_each(pair):
    """A stream that is itself an open image: reads never wait behind transfers."""
    store, backend = pair
    await aio.transfer(store.add, "origin", DATA)
    aio.transfer_limiter().total_tokens = aio.read_limiter().total_tokens = 1
    try:

        async def copy(name):
            async with aio.open(store.get, "fake://host/origin") as image:
                await aio.transfer(store.add, name, aio.source(image), size=image.size)

        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(copy, f"copy{number}")
    finally:
        aio.transfer_limiter().total_tokens = aio.TRANSFERS
        aio.read_limiter().total_tokens = aio.READS
    assert {data for _, data in backend.images.values()} == {DATA}
    assert len(backend.images) == 11


async def test_threads_are_bounded(pair):
    store, backend = pair
    gate = anyio.Event()
    most = 0

    async def waiting():
        nonlocal most
        most = max(most, aio.transfer_limiter().borrowed_tokens)
        await gate.wait()
        yield DATA

    before = threading.active_count()
    async with anyio.create_task_group() as group:
        for number in range(2 * aio.TRANSFERS):
            group.start_soon(partial(aio.transfer, store.add, f"i{number}", aio.source(waiting())))
        await until(lambda: most == aio.TRANSFERS)
        assert threading.active_count() - before <= aio.TRANSFERS
        gate.set()
    assert most == aio.TRANSFERS
    assert len(backend.images) == 2 * aio.TRANSFERS


async def test_files_on_a_real_driver(tmp_path):
    data = random.Random(3).randbytes(3 << 20)
    with open_store("file", datadir=str(tmp_path)) as store:
        added = await aio.transfer(store.add, "i", aio.source(pieces(data, 65536)))
        async with aio.open(store.get, added.location, expected=added.digests) as image:
            assert b"".join([chunk async for chunk in image]) == data
        started = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(partial(aio.transfer, store.add, "j", aio.source(silent(data, started))))
            await started.wait()
            group.cancel_scope.cancel()
        assert not list(store.uploads())
        assert [image.image_id for image in store.list()] == ["i"]


def test_anyio_is_imported_late_and_named_if_missing():
    code = """
import sys
import imagestore._stores, imagestore.config
assert "anyio" not in sys.modules
sys.modules["anyio"] = None
try:
    import imagestore.aio
except Exception as error:
    print(type(error).__name__, error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("MissingDependency")
    assert "imagestore[aio]" in output
