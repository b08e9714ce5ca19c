"""A driver that fails as told: for the kit, and for the tests of applications that use imagestore."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias, TypeVar

from imagestore.driver import Block, Driver, Hints, Location, Reading, Stat, Upload
from imagestore.errors import StoreError

__all__ = ["Call", "Faults", "FaultyDriver", "Killed"]

T = TypeVar("T")

ErrorMaker: TypeAlias = "BaseException | Callable[[], BaseException]"

COUNTED: Final = frozenset(
    {"locate", "delete", "uploads", "discard", "list", "usage", "extents", "copy", "sign", "set_acls"}
)
"""Verbs that pass through the plan; ``check_id`` is pure and ``create`` and ``bind`` are wrapped."""


class Killed(BaseException):
    """The process was killed, as far as the driver is concerned: it is not called any more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of the driver: its operation, which call of that operation it is (from 1), and its arguments."""

    operation: str
    number: int
    arguments: tuple[Any, ...] = ()


@dataclasses.dataclass(kw_only=True, slots=True)
class _Rule:
    operation: str
    action: Callable[[Call], object]
    at: int
    times: int | None
    after: bool


class Faults:
    """What goes wrong, and a record of all calls. One plan may serve several drivers at once.

    Operations are ``open, locate, stat, read, chunk, create, write, commit, abort, delete, list, uploads, discard,
    usage, extents, copy, sign, set_acls``. ``at`` counts the calls of an operation from 1; ``times`` is on how many
    calls from there it happens, None for all; ``after`` lets the call take effect first.

    Attributes:
        calls: how often each operation was called.
        log: every call, in the order of their beginnings.
        dead: `die` has happened.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.log: list[Call] = []
        self.dead = False
        self._lock = threading.Lock()
        self._rules: list[_Rule] = []
        self._cuts: list[tuple[int, ErrorMaker | None]] = []
        self._death: tuple[int, bool] | None = None
        self._open_uploads: list[Upload] = []
        self._open_drivers: list[Driver] = []

    def on(
        self,
        operation: str,
        action: Callable[[Call], object],
        *,
        at: int = 1,
        times: int | None = 1,
        after: bool = False,
    ) -> None:
        """Call ``action`` before (or after) the operation, in its thread; what it raises is the driver's error."""
        with self._lock:
            self._rules.append(_Rule(operation=operation, action=action, at=at, times=times, after=after))

    def fail(
        self, operation: str, error: ErrorMaker, *, at: int = 1, times: int | None = 1, after: bool = False
    ) -> None:
        """Raise ``error``: an exception, or what makes one."""

        def action(call: Call) -> None:
            raise _made(error)

        self.on(operation, action, at=at, times=times, after=after)

    def delay(self, operation: str, seconds: float, *, at: int = 1, times: int | None = None) -> None:
        """Let the operation take so much longer."""
        self.on(operation, lambda call: time.sleep(seconds), at=at, times=times)

    def cut(self, length: int, error: ErrorMaker | None = None, *, times: int = 1) -> None:
        """Break reads after ``length`` bytes: with ``error``, or (None) as if the image ended there."""
        with self._lock:
            self._cuts += [(length, error)] * times

    def die(self, at: int, *, after: bool = False) -> None:
        """From the ``at``-th call of anything on, raise `Killed`: nobody cleans up, as after ``kill -9``."""
        self._death = (at, after)

    def heal(self) -> None:
        """Forget all that was to go wrong. The dead stay dead."""
        with self._lock:
            self._rules.clear()
            self._cuts.clear()

    def bury(self) -> None:
        """Abort the uploads and close the drivers that a `die` left open: this process gives up what they hold."""
        with self._lock:
            uploads, self._open_uploads = self._open_uploads, []
            drivers, self._open_drivers = self._open_drivers, []
        for give_up in (*(upload.abort for upload in uploads), *(driver.close for driver in drivers)):
            with contextlib.suppress(Exception):
                give_up()

    def _run(self, operation: str, function: Callable[[], T], arguments: tuple[Any, ...] = ()) -> T:
        with self._lock:
            if self.dead:
                raise Killed("dead already")
            self.calls[operation] += 1
            call = Call(operation=operation, number=self.calls[operation], arguments=arguments)
            self.log.append(call)
            dies = self._death is not None and len(self.log) == self._death[0]
            dies_after = dies and self._death is not None and self._death[1]
            self.dead = dies and not dies_after
            rules = [
                rule
                for rule in self._rules
                if rule.operation == operation
                and rule.at <= call.number
                and (rule.times is None or call.number < rule.at + rule.times)
            ]
        if dies and not dies_after:
            raise Killed(f"killed before {operation}")
        for rule in rules:
            if not rule.after:
                rule.action(call)
        result = function()
        if dies_after:
            self.dead = True
            raise Killed(f"killed after {operation}")
        for rule in rules:
            if rule.after:
                rule.action(call)
        return result

    def _next_cut(self) -> tuple[int, ErrorMaker | None] | None:
        with self._lock:
            return self._cuts.pop(0) if self._cuts else None


class FaultyDriver(Driver):
    """Wraps any driver and puts `Faults` between it and its store. It has exactly the verbs of the driver.

    ``changes`` replaces fields of its `Capabilities`.
    """

    def __init__(self, driver: Driver, faults: Faults, changes: dict[str, Any] | None = None) -> None:
        self._driver = driver
        self._faults = faults
        self._changes = changes or {}
        # Class variables of Driver, which its instances may not shadow by plain assignment.
        for name in ("api", "name", "schemes", "options"):
            setattr(self, name, getattr(driver, name))
        if hasattr(driver, "capabilities"):
            self.capabilities = dataclasses.replace(driver.capabilities, **self._changes)

    def clone(self) -> Driver:
        return FaultyDriver(self._driver.clone(), self._faults, self._changes)

    def open(self) -> None:
        def open_it() -> None:
            self._driver.open()
            self._faults._open_drivers.append(self._driver)

        self._faults._run("open", open_it)
        self.capabilities = dataclasses.replace(self._driver.capabilities, **self._changes)

    def close(self) -> None:
        self._driver.close()
        with self._faults._lock, contextlib.suppress(ValueError):
            self._faults._open_drivers.remove(self._driver)

    def parse(self, uri: str, /) -> Location:
        return self._driver.parse(uri)

    def translate(self, error: Exception, /) -> StoreError | None:
        return self._driver.translate(error)

    def stat(self, location: Location, /) -> Stat:
        return self._faults._run("stat", lambda: self._driver.stat(location), (location,))

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        reading = self._faults._run(
            "read", lambda: self._driver.read(location, start, stop, version=version), (location, start, stop, version)
        )
        return Reading(stat=reading.stat, chunks=self._chunks(reading.chunks), close=reading.close)

    def _chunks(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        cut = self._faults._next_cut()
        done = 0
        while chunk := self._faults._run("chunk", lambda: next(chunks, b"")):
            if cut is not None and done + len(chunk) >= cut[0]:
                if part := chunk[: cut[0] - done]:
                    yield part
                if cut[1] is not None:
                    raise _made(cut[1])
                return
            done += len(chunk)
            yield chunk

    def __getattr__(self, name: str) -> Any:
        # Only what Driver itself does not have comes here: the optional verbs, and the driver's own attributes.
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._driver, name)
        if name == "create":
            return self._create
        if name == "bind":
            return self._bind
        if name in COUNTED and callable(found):
            return functools.partial(self._verb, name, found)
        return found

    def _verb(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self._faults._run(name, lambda: function(*args, **kwargs), args)

    def _bind(self, auth: Any) -> Driver:
        bound: Driver = self._driver.bind(auth)  # type: ignore[attr-defined]  # an optional verb, looked up before
        return FaultyDriver(bound, self._faults, self._changes)

    def _create(self, image_id: str, hints: Hints) -> Upload:
        def create() -> Upload:
            upload: Upload = self._driver.create(image_id, hints)  # type: ignore[attr-defined]  # as above
            self._faults._open_uploads.append(upload)
            return upload

        return _FaultyUpload(self._faults._run("create", create, (image_id, hints)), self._faults)


class _FaultyUpload(Upload):
    def __init__(self, upload: Upload, faults: Faults) -> None:
        self._upload = upload
        self._faults = faults
        self.location = upload.location

    def write(self, block: Block, /) -> None:
        self._faults._run("write", lambda: self._upload.write(block), (block,))

    def commit(self, size: int, /) -> None:
        self._upload.digests = self.digests
        self._faults._run("commit", lambda: self._upload.commit(size), (size,))
        self.location = self._upload.location
        self._ended()

    def abort(self) -> None:
        self._faults._run("abort", self._upload.abort)
        self._ended()

    def _ended(self) -> None:
        with self._faults._lock, contextlib.suppress(ValueError):
            self._faults._open_uploads.remove(self._upload)


def _made(error: ErrorMaker) -> BaseException:
    # A fresh one each time: whoever catches it adds context to it.
    return copy.copy(error) if isinstance(error, BaseException) else error()
