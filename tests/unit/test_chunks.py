"""The chunks of a driver's reading: given in order, and given up exactly once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from imagestore.driver import Chunks
from imagestore.errors import Cancelled, Unavailable


class Taken(Chunks):
    """Gives, or raises, one thing after the other. Knows when it is used as the contract does not allow."""

    def __init__(self, *things: bytes | BaseException | Callable[[], bytes], refuses: Exception | None = None) -> None:
        super().__init__()
        self.things = list(things)
        self.refuses = refuses
        self.inside = False
        self.fetched = 0
        self.released: list[int] = []

    def fetch(self) -> bytes:
        assert not self.inside
        assert not self.released
        self.fetched += 1
        self.inside = True
        try:
            thing = self.things.pop(0) if self.things else b""
            if isinstance(thing, BaseException):
                raise thing
            return thing if isinstance(thing, bytes) else thing()
        finally:
            self.inside = False

    def release(self) -> None:
        assert not self.inside, "released under a fetch"
        self.released.append(threading.get_ident())
        if self.refuses is not None:
            raise self.refuses


class Gate:
    """A chunk that comes when it is let through."""

    def __init__(self, data: bytes | Exception = b"late") -> None:
        self.data = data
        self.entered = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> bytes:
        self.entered.set()
        assert self.go.wait(30)
        if isinstance(self.data, Exception):
            raise self.data
        return self.data


class Asking(threading.Thread):
    """Asks for one chunk."""

    def __init__(self, chunks: Chunks) -> None:
        super().__init__(daemon=True)
        self.chunks = chunks
        self.outcome: object = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = next(self.chunks, None)
        except Exception as error:  # noqa: BLE001 - told to the thread that waits
            self.outcome = error

    def wait(self) -> object:
        self.join(30)
        assert not self.is_alive()
        return self.outcome


def closed(chunks: Chunks) -> bool:
    """Asked in another thread: should nobody ever get a turn again, the test fails and does not hang."""
    return all(isinstance(Asking(chunks).wait(), Cancelled) for _ in range(2))


def test_chunks_come_in_order_and_end() -> None:
    chunks = Taken(b"one", b"two")
    assert iter(chunks) is chunks
    assert next(chunks) == b"one"
    assert not chunks.released
    assert list(chunks) == [b"two"]
    assert len(chunks.released) == 1
    assert list(chunks) == []
    chunks.close()
    assert list(chunks) == [], "what has ended was not cut short by a close"
    assert (chunks.fetched, len(chunks.released)) == (3, 1)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_close_before_the_end(taken: int) -> None:
    chunks = Taken(b"one", b"two")
    for _ in range(taken):
        next(chunks)
    chunks.close()
    assert len(chunks.released) == 1
    assert closed(chunks)
    chunks.close()
    assert (chunks.fetched, len(chunks.released)) == (taken, 1)


@pytest.mark.parametrize("error", [Unavailable("broken"), OSError("native"), KeyboardInterrupt(), StopIteration()])
def test_a_fetch_that_fails(error: BaseException) -> None:
    chunks = Taken(b"one", error, b"two")
    next(chunks)
    with pytest.raises(type(error)) as caught:
        next(chunks)
    assert caught.value is error
    assert len(chunks.released) == 1
    assert closed(chunks)
    chunks.close()
    assert (chunks.fetched, len(chunks.released)) == (2, 1)


def test_a_release_that_fails_in_a_close() -> None:
    chunks = Taken(b"one", refuses=OSError("stuck"))
    with pytest.raises(OSError, match="stuck"):
        chunks.close()
    chunks.close()
    assert closed(chunks)
    assert len(chunks.released) == 1


def test_a_release_that_fails_at_the_end() -> None:
    chunks = Taken(b"one", refuses=OSError("stuck"))
    next(chunks)
    with pytest.raises(OSError, match="stuck"):
        next(chunks)
    assert list(chunks) == []
    chunks.close()
    assert len(chunks.released) == 1


def test_a_release_that_fails_after_a_fetch_did() -> None:
    first = Unavailable("broken")
    chunks = Taken(first, refuses=OSError("stuck at https://user:secret@host/?key=secret"))
    with pytest.raises(Unavailable) as caught:
        next(chunks)
    assert caught.value is first
    [note] = first.__notes__
    assert "OSError: stuck at https://" in note
    assert "secret" not in note
    assert closed(chunks)
    assert len(chunks.released) == 1


@pytest.mark.parametrize("data", [b"late", b"", Unavailable("broken")])
def test_a_close_while_another_thread_fetches(data: bytes | Exception) -> None:
    gate = Gate(data)
    chunks = Taken(gate)
    asking = Asking(chunks)
    assert gate.entered.wait(30)
    for _ in range(2):
        chunks.close()  # returns while the other thread is held
    assert not chunks.released
    gate.go.set()
    assert asking.wait() == (data or None), "what was fetched is given away, and no other error than the fetch's"
    assert chunks.released == [asking.ident]
    if data:
        assert closed(chunks)
    else:
        assert list(chunks) == []
    chunks.close()
    assert (chunks.fetched, len(chunks.released)) == (1, 1)


def test_a_release_that_fails_in_the_thread_that_fetched() -> None:
    gate = Gate()
    chunks = Taken(gate, refuses=OSError("stuck"))
    asking = Asking(chunks)
    assert gate.entered.wait(30)
    chunks.close()
    gate.go.set()
    assert isinstance(asking.wait(), OSError)
    assert closed(chunks)


def test_two_threads_that_ask_are_served_one_after_the_other() -> None:
    gate = Gate(b"one")
    chunks = Taken(gate, b"two")
    first = Asking(chunks)
    assert gate.entered.wait(30)
    second = Asking(chunks)
    gate.go.set()
    assert [first.wait(), second.wait()] == [b"one", b"two"]
    assert not chunks.released


def test_a_close_from_inside_a_fetch() -> None:
    def closing() -> bytes:
        chunks.close()
        assert not chunks.released
        return b"one"

    chunks = Taken(closing, b"two")
    assert next(chunks) == b"one"
    assert len(chunks.released) == 1
    assert closed(chunks)


class Turn:
    """A lock that lets something happen between two steps of whoever takes it."""

    def __init__(self, moment: str, happens: Callable[[], None]) -> None:
        self.lock = threading.Lock()
        self.events = {moment: happens}

    def passed(self, moment: str) -> None:
        if event := self.events.pop(moment, None):
            # In another thread, as it would be.
            thread = threading.Thread(target=event)
            thread.start()
            thread.join(30)
            assert not thread.is_alive(), "a close waits for the thread that fetches"

    def acquire(self, blocking: bool = True) -> bool:
        self.passed("before")
        got = self.lock.acquire(blocking)
        if got:
            self.passed("taken")
        return got

    def release(self) -> None:
        self.passed("giving")
        self.lock.release()
        self.passed("given")

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


@pytest.mark.parametrize("moment", ["before", "taken", "giving", "given"])
@pytest.mark.parametrize("things", [(b"one",), (), (Unavailable("broken"),)], ids=["chunk", "end", "error"])
def test_a_close_at_every_moment_of_a_fetch(moment: str, things: tuple[Any, ...]) -> None:
    chunks = Taken(*things)
    chunks._turn = Turn(moment, chunks.close)  # type: ignore[assignment]
    late = moment in ("giving", "given")
    try:
        outcome: object = next(chunks, None)
    except (Cancelled, Unavailable) as error:
        outcome = type(error)
    if late:
        assert outcome == (None if not things else b"one" if things[0] == b"one" else Unavailable)
    else:
        assert outcome is Cancelled
        assert not chunks.fetched
    assert len(chunks.released) == 1


def test_closes_by_two_threads() -> None:
    for moment in ("before", "taken", "giving", "given"):
        chunks = Taken(b"one")
        chunks._turn = Turn(moment, chunks.close)  # type: ignore[assignment]
        chunks.close()
        assert len(chunks.released) == 1
        assert closed(chunks)


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_closes_at_random_moments() -> None:
    for number in range(200):
        chunks = Taken(*[b"x"] * (number % 7))
        threads = [Asking(chunks), threading.Thread(target=chunks.close), Asking(chunks)]
        threads[1].start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert len(chunks.released) == 1
        for asking in (threads[0], threads[2]):
            assert isinstance(asking, Asking)
            assert asking.outcome in (b"x", None) or isinstance(asking.outcome, Cancelled)
