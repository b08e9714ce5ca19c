"""What transfers share: a byte budget, threads, and the observer's thread."""

from __future__ import annotations

import contextlib
import contextvars
import io
import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from imagestore._models import Event, Limits, Observer
from imagestore.errors import StoreError

__all__ = ["Budget", "Engine", "Lane", "Share"]

_log = logging.getLogger("imagestore")

GRACE: Final = 5.0
"""Seconds after which a transfer that holds nothing gets its block even beyond the budget, if nobody gave back any
memory meanwhile: sources that stall with blocks in hand must not stop everybody else for ever."""

EVENTS_MAX: Final = 10_000
FLUSH: Final = 2.0


class Budget:
    """A number of bytes that waiting transfers get in the order in which they asked."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.peak = 0
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, threading.Event]] = deque()
        self._releases = 0

    def acquire(self, amount: int, *, empty_handed: bool, check: Callable[[], None]) -> None:
        """Wait for ``amount`` bytes. ``check`` is called while waiting and ends it by raising."""
        turn = threading.Event()
        entry = (amount, turn)
        with self._lock:
            self._waiting.append(entry)
            self._serve()
            seen = self._releases
        waited = 0.0
        try:
            while not turn.wait(0.5):
                waited += 0.5
                check()
                with self._lock:
                    if self._releases != seen:
                        seen, waited = self._releases, 0.0
                    elif empty_handed and waited >= GRACE and not turn.is_set():
                        self._waiting.remove(entry)
                        self._grant(entry)
        except BaseException:
            with self._lock:
                if turn.is_set():
                    self._give_back(amount)
                else:
                    self._waiting.remove(entry)
                    self._serve()
            raise

    def try_acquire(self, amount: int) -> bool:
        """Take ``amount`` bytes if they are free and nobody waits."""
        with self._lock:
            if self._waiting or (self.used and self.used + amount > self.total):
                return False
            self.used += amount
            self.peak = max(self.peak, self.used)
            return True

    def release(self, amount: int) -> None:
        with self._lock:
            self._give_back(amount)

    def _give_back(self, amount: int) -> None:
        self.used -= amount
        self._releases += 1
        self._serve()

    def _serve(self) -> None:
        # One block larger than the whole budget must pass too, when nothing else is in flight.
        while self._waiting and (self.used == 0 or self.used + self._waiting[0][0] <= self.total):
            self._grant(self._waiting.popleft())

    def _grant(self, entry: tuple[int, threading.Event]) -> None:
        self.used += entry[0]
        self.peak = max(self.peak, self.used)
        entry[1].set()


class Blocks:
    """Memory of whole blocks, used again: malloc keeps what a thread freed in an arena of that thread, so that many
    transfers in turn would hold far more than their budget.

    A `BytesIO` is bytes that can be filled anew. Should anybody still hold the bytes that it gave out, it leaves them
    alone and takes fresh memory by itself.
    """

    def __init__(self) -> None:
        self._free: list[tuple[int, io.BytesIO]] = []
        self._held = 0
        self._lock = threading.Lock()

    def take(self, length: int) -> io.BytesIO:
        """A buffer of ``length`` bytes, of any content."""
        with self._lock:
            while self._free:
                size, buffer = self._free.pop()
                self._held -= size
                if size == length:
                    return buffer
        return io.BytesIO(bytes(length))

    def give(self, length: int, buffer: io.BytesIO) -> None:
        with self._lock:
            self._free.append((length, buffer))
            self._held += length

    def trim(self, most: int) -> None:
        """Let go of what is more than ``most`` bytes."""
        with self._lock:
            while self._held > most:
                self._held -= self._free.pop()[0]


class Room:
    """Memory that a transfer was granted for one block."""

    __slots__ = ("_buffer", "_share", "_size")

    def __init__(self, share: Share, size: int) -> None:
        self._share = share
        self._size = size
        self._buffer: tuple[int, io.BytesIO] | None = None

    def buffer(self, length: int) -> io.BytesIO:
        """To be filled to its end; used again when the room is given back."""
        self._buffer = length, self._share.blocks.take(length)
        return self._buffer[1]

    def settle(self, size: int) -> None:
        """The block was made and is no longer than this."""
        if self._buffer is None:
            self._share.make_room()
        if size < self._size:
            self._buffer = None
            self._share.release(self._size - size)
            self._size = size

    def release(self) -> None:
        if self._buffer is not None:
            self._share.blocks.give(*self._buffer)
            self._buffer = None
        self._share.release(self._size)
        self._size = 0


class Share:
    """One transfer's part of the budget: never more than ``limit``, or two blocks where those are more."""

    def __init__(self, budget: Budget, limit: int, blocks: Blocks | None = None) -> None:
        self._budget = budget
        self._limit = limit
        self.blocks = blocks or Blocks()
        self._held = 0
        self._change = threading.Condition()

    def acquire(self, amount: int, check: Callable[[], None]) -> None:
        with self._change:
            while self._held and self._held + amount > max(self._limit, 2 * amount):
                self._change.wait(0.5)
                check()
            self._held += amount
            empty_handed = self._held == amount
        try:
            self._budget.acquire(amount, empty_handed=empty_handed, check=check)
        except BaseException:
            with self._change:
                self._held -= amount
            raise

    def room(self, amount: int, check: Callable[[], None]) -> Room:
        """`acquire`, and with it the memory."""
        self.acquire(amount, check)
        return Room(self, amount)

    def make_room(self) -> None:
        """Memory that was not taken from `blocks` is in use: together they keep to the budget."""
        self.blocks.trim(self._budget.total - self._budget.used)

    def try_acquire(self, amount: int) -> bool:
        """Take ``amount`` if that needs no waiting."""
        with self._change:
            if self._held and self._held + amount > max(self._limit, 2 * amount):
                return False
            if not self._budget.try_acquire(amount):
                return False
            self._held += amount
            return True

    def release(self, amount: int) -> None:
        if not amount:
            return
        with self._change:
            self._held -= amount
            self._change.notify_all()
        self._budget.release(amount)
        self.blocks.trim(self._budget.used)

    def close(self) -> None:
        """Give back what is still held. Only when nothing uses it any more."""
        with self._change:
            held, self._held = self._held, 0
        if held:
            self._budget.release(held)
            self.blocks.trim(self._budget.used)


class Lane:
    """Runs one transfer's jobs on a shared pool: at most ``width`` at once, and in order if that is 1.

    After each job the lane queues up again behind the others, so that no transfer keeps a thread of the pool to
    itself. The first error is kept in ``error``; jobs after it are dropped, but their ``done`` is always called.
    """

    def __init__(self, pool: ThreadPoolExecutor, width: int) -> None:
        self._pool = pool
        self._width = width
        self._jobs: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._running = 0
        self._dropped = False
        self._change = threading.Condition()
        self.error: BaseException | None = None

    def submit(self, job: Callable[[], None], done: Callable[[], None]) -> None:
        with self._change:
            self._jobs.append((job, done))
            if self._running >= self._width:
                return
            self._running += 1
        self._schedule()

    def wait(self, most: int = 0, check: Callable[[], None] | None = None) -> None:
        """Wait until at most ``most`` jobs are queued or running."""
        with self._change:
            while len(self._jobs) + self._running > most:
                self._change.wait(0.5 if check else None)
                if check:
                    check()

    def drop(self) -> None:
        """Forget what has not begun, and wait for what has."""
        with self._change:
            self._dropped = True
        self.wait()

    def _schedule(self) -> None:
        try:
            self._pool.submit(self._run)
        except RuntimeError:
            # The pool was shut down: the store was closed under a running transfer.
            with self._change:
                self.error = self.error or StoreError("the store was closed while a transfer was running")
                self._running -= 1
                dropped = list(self._jobs) if self._running == 0 else []
                if self._running == 0:
                    self._jobs.clear()
                self._change.notify_all()
            for _, done in dropped:
                done()

    def _run(self) -> None:
        with self._change:
            job, done = self._jobs.popleft() if self._jobs else (None, None)
            failed = self._dropped or self.error is not None
        if job is not None and done is not None:
            try:
                if not failed:
                    job()
            except BaseException as error:  # noqa: BLE001 - carried over to the transfer's thread
                with self._change:
                    self.error = self.error or error
            finally:
                # The job goes before its memory counts as given back.
                del job
                done()
        with self._change:
            more = bool(self._jobs)
            if not more:
                self._running -= 1
            self._change.notify_all()
        if more:
            self._schedule()


class Engine:
    """The limits, byte budget, digest threads and event thread that the stores of one `Stores` share."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._reset()
        _after_fork.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self.budget = Budget(self.limits.memory_total)
        self.blocks = Blocks()
        self._digest_pool: ThreadPoolExecutor | None = None
        self._events: _Events | None = None

    def share(self, enough: int | None = None) -> Share:
        """What one transfer may hold: no more than ``enough`` bytes, if it is known that more makes nothing faster."""
        limit = self.limits.memory if enough is None else min(enough, self.limits.memory)
        return Share(self.budget, limit, self.blocks)

    def digest_pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._digest_pool is None:
                self._digest_pool = ThreadPoolExecutor(self.limits.workers, "imagestore-digest")
            return self._digest_pool

    def observe(self, observer: Observer, event: Event, context: contextvars.Context | None = None) -> None:
        """Let ``observer`` have ``event`` soon, in the ``context`` of the call that it tells of. Never waits."""
        with self._lock:
            if self._events is None:
                self._events = _Events()
            self._events.send(context or contextvars.Context(), observer, event)

    def close(self) -> None:
        with self._lock:
            pool, self._digest_pool = self._digest_pool, None
            events, self._events = self._events, None
        if pool is not None:
            pool.shutdown()
        if events is not None:
            events.close()


class _Events:
    """Hands events to observers, in order, from a thread of its own; drops what an observer is too slow for."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[contextvars.Context, Observer, Event] | None] = queue.Queue(EVENTS_MAX)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="imagestore-events", daemon=True)
        self._thread.start()

    def send(self, context: contextvars.Context, observer: Observer, event: Event) -> None:
        try:
            self._queue.put_nowait((context, observer, event))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Let the observers have what is queued; one that hangs is left behind."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=FLUSH)
        self._thread.join(FLUSH)
        if self._dropped or self._thread.is_alive():
            _log.warning("an observer was too slow: %d events were dropped", self._dropped)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            context, observer, event = item
            try:
                context.run(observer, event)
            except Exception:  # noqa: BLE001 - logged; an observer can't be allowed to break a transfer
                _log.exception("an observer failed on %s", type(event).__name__)


_after_fork: weakref.WeakSet[Engine] = weakref.WeakSet()


def _reset_engines() -> None:
    for engine in _after_fork:
        engine._reset()


os.register_at_fork(after_in_child=_reset_engines)
