"""The async host's door: the few lines that a host on asyncio or trio needs around the blocking calls of a store.

There is no second API here, no loop and no thread pool: a `Store` stays what it is, and its calls run in anyio's
worker threads. Three functions make the correct thing easy::

    await aio.transfer(store.add, image_id, aio.source(stream), size=size)

    async with aio.open(store.get, location, start=start) as image:
        async for chunk in image:
            ...

`transfer` and `open` take the store's method and its arguments as they are, and raise what it raises. Short calls
need nothing of this: ``await anyio.to_thread.run_sync(store.delete, location)``.

`transfer` exists because ``to_thread.run_sync`` alone can't be cancelled: of a cancelled task it would either wait
for the whole transfer, or leave the thread running behind its back.

**Threads.** A transfer keeps one worker thread from its beginning to its end, waiting for the event loop most of
that time. On anyio's default limiter (40 threads, which all other code of the process uses too) forty slow uploads
would stop everything else, and for ever if their own streams need a thread to go on, as files do. So transfers have a
limiter of their own (`transfer_limiter`), and reads, which never wait for the event loop, another (`read_limiter`).
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, ParamSpec, Self, TypeVar

from imagestore._models import KIB, MIB
from imagestore._reader import ImageReader
from imagestore.driver import require
from imagestore.errors import Cancelled

require("anyio", extra="aio")  # so that its absence is named with the command that helps

import anyio  # noqa: E402 - only now it is known to be there
import anyio.from_thread  # noqa: E402
import anyio.lowlevel  # noqa: E402
import anyio.to_thread  # noqa: E402

__all__ = ["AsyncImage", "open", "read_limiter", "source", "transfer", "transfer_limiter"]

P = ParamSpec("P")
T = TypeVar("T")

TRANSFERS: Final = 100
READS: Final = 40

GATHER: Final = 256 * KIB
"""Bytes that `source` collects before it hands them to the waiting thread: a network's pieces are small, and the way
from thread to loop and back costs more than copying them."""

AHEAD: Final = MIB
PATIENCE: Final = 0.05
"""An `AsyncImage` reads this many bytes, or for about so many seconds, each time that it goes to a thread."""

_transfers: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar("imagestore_transfers")
_reads: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar("imagestore_reads")


def transfer_limiter() -> anyio.CapacityLimiter:
    """How many transfers this event loop runs at once, a thread each: 100, or what ``total_tokens`` is set to.

    Others wait for their turn before they begin. A set of transfers that wait for each other (one stream split into
    several adds) must fit in as a whole.
    """
    return _limiter(_transfers, TRANSFERS)


def read_limiter() -> anyio.CapacityLimiter:
    """How many reads of `open` images this event loop has in threads at once: 40, or what ``total_tokens`` is set to.

    An open image holds a thread only while the next bytes are read.
    """
    return _limiter(_reads, READS)


def _limiter(variable: anyio.lowlevel.RunVar[anyio.CapacityLimiter], total: int) -> anyio.CapacityLimiter:
    try:
        return variable.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(total)
        variable.set(limiter)
        return limiter


def source(stream: AsyncIterable[bytes]) -> Iterator[bytes]:
    """Make a source for a blocking call of an async iterable, such as the body of a request.

    The call must run in a worker thread of anyio, as `transfer` sees to. What ``stream`` raises becomes the cause of
    a `SourceError`. It is read by up to 256 KiB ahead, and not closed: put an async generator of yours into
    ``contextlib.aclosing``. Each step may run in a task of its own, so ``stream`` must not keep a cancel scope, a
    time-out or a task group open from one piece to the next.
    """
    pieces = aiter(stream)
    ended = False
    while not ended:
        chunks, ended = anyio.from_thread.run(_gather, pieces)
        yield from chunks


async def _gather(pieces: AsyncIterator[bytes]) -> tuple[list[bytes], bool]:
    # On asyncio a scope that was cancelled earlier does not reach a task that a thread puts into it afterwards.
    if anyio.current_effective_deadline() == -math.inf:
        raise Cancelled("the task was cancelled")
    chunks: list[bytes] = []
    size = 0
    async for chunk in pieces:
        chunks.append(chunk)
        size += len(chunk)
        if size >= GATHER:
            return chunks, False
    return chunks, True


async def transfer(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking transfer (``store.add``, ``download``, ``verify``, …) in a worker thread, cancellable.

    ``function`` is called with the arguments given and must take ``cancel``, as every transfer of a store does. If
    the task is cancelled, in whatever way, the source is cancelled, ``cancel`` is set, and the transfer is waited
    for until it has taken back what it stored; then the cancellation goes on. That takes half a second, plus what a
    backend needs to answer a request that is under way and to abort: ``Timeouts`` bound it. A commit that has begun
    is not broken off: after a cancellation in that moment the image may stand, whole.

    Raises what ``function`` raises, unchanged.
    """
    cancel = _cancel(kwargs)
    return await _run(transfer_limiter(), cancel, partial(function, *args, **kwargs))


@asynccontextmanager
async def open(  # noqa: A001 - used as aio.open
    get: Callable[P, ImageReader], /, *args: P.args, **kwargs: P.kwargs
) -> AsyncIterator[AsyncImage]:
    """Open an image for reading: ``async with aio.open(store.get, location, …) as image``.

    Calls ``get`` with the arguments given, in a worker thread, and gives an `AsyncImage`. Raises what ``get`` raises.
    However the block is left, the connection is closed; a read that is under way at a cancellation is waited for
    (``Timeouts.stall`` bounds it). May be used around a ``yield``: it keeps no cancel scope and no task.
    """
    cancel = _cancel(kwargs)
    readers: list[ImageReader] = []
    try:
        await _run(read_limiter(), cancel, lambda: readers.append(get(*args, **kwargs)))
        yield AsyncImage(readers[0], cancel)
    finally:
        for reader in readers:
            with anyio.CancelScope(shield=True):
                await _run(anyio.CapacityLimiter(1), cancel, reader.close)


class AsyncImage:
    """An image being read: an async iterator over chunks of bytes, for one task.

    Each trip to a worker thread reads up to 1 MiB ahead, or for 50 ms, so a slow backend's bytes don't wait for
    more. An error comes as soon as it is known, and what was read ahead of it is not delivered.

    Attributes:
        size: bytes that it delivers in all.
        stat: what the backend knows of the image.
    """

    def __init__(self, reader: ImageReader, cancel: threading.Event) -> None:
        """Made by `open`."""
        self.size = reader.size
        self.stat = reader.stat
        self._reader = reader
        self._cancel = cancel
        self._chunks: deque[bytes] = deque()
        self._guard = anyio.ResourceGuard("reading from")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        with self._guard:
            if not self._chunks:
                self._chunks.extend(await _run(read_limiter(), self._cancel, self._pull))
        if not self._chunks:
            raise StopAsyncIteration
        return self._chunks.popleft()

    def _pull(self) -> list[bytes]:
        chunks: list[bytes] = []
        size = 0
        until = time.monotonic() + PATIENCE
        while chunk := self._reader.read1():
            chunks.append(chunk)
            size += len(chunk)
            if size >= AHEAD or time.monotonic() >= until:
                break
        return chunks


def _cancel(kwargs: dict[str, Any]) -> threading.Event:
    cancel = kwargs.get("cancel") or threading.Event()
    kwargs["cancel"] = cancel
    assert isinstance(cancel, threading.Event)
    return cancel


async def _run(limiter: anyio.CapacityLimiter, cancel: threading.Event, function: Callable[[], T]) -> T:
    """Run ``function`` in a worker thread. On cancellation set ``cancel`` and wait for the thread all the same."""
    return (await _outcome(limiter, cancel, function)).result()


async def _outcome(limiter: anyio.CapacityLimiter, cancel: threading.Event, function: Callable[[], T]) -> Future[T]:
    """What came of ``function``.

    The thread is waited for in a task of its own, because asyncio's own ``Task.cancel`` reaches into a shielded
    scope of the task that it cancels, and would leave the thread behind.
    """
    calls = [function]
    outcomes: list[Future[T]] = []
    finished = anyio.Event()
    shield = anyio.CancelScope(shield=True)

    # The traceback of a failed transfer holds its blocks, and a server may keep an error for long: they are let go at
    # once. An idle worker of anyio may keep its last call and error: it gets neither. And no frame that the error's own
    # traceback leads to holds the error.
    def in_thread() -> None:
        outcome: Future[T] = Future()
        outcomes.append(outcome)
        try:
            outcome.set_result(calls.pop()())
        except Exception as error:  # noqa: BLE001 - raised by the task that waits
            traceback.clear_frames(error.__traceback__)
            outcome.set_exception(error)
        finally:
            del outcome

    async def work() -> None:
        try:
            with shield:
                await anyio.to_thread.run_sync(in_thread, limiter=anyio.CapacityLimiter(1))
        finally:
            finished.set()

    async with limiter, anyio.create_task_group() as group:
        group.start_soon(work)
        try:
            await finished.wait()
        except anyio.get_cancelled_exc_class():
            cancel.set()
            shield.cancel()
            raise
    return outcomes.pop()
