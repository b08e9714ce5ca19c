"""Calling a driver: native errors become ours at one place, and what failed for a moment is tried again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Never, ParamSpec, TypeVar

from imagestore._models import Location, Retry
from imagestore.driver import Driver
from imagestore.errors import StoreError

__all__ = ["Backoff", "Caller", "Notify"]

P = ParamSpec("P")
T = TypeVar("T")

Notify = Callable[[str, StoreError, int, float], None]
"""Told of every attempt that will be repeated: step, error, number of the attempt, seconds to wait."""


class Backoff:
    """Decides after each failure whether and when the next attempt comes.

    Doubling waits with jitter between half and the whole of each; a backend's Retry-After is honoured up to the
    longest wait. `progressed` starts the count and the time budget anew.
    """

    def __init__(self, policy: Retry, *, stop: threading.Event | None = None, notify: Notify | None = None) -> None:
        self._policy = policy
        self._stop = stop or threading.Event()
        self._notify = notify
        self.progressed()

    def progressed(self) -> None:
        self._failures = 0
        self._began = time.monotonic()

    def failed(self, error: StoreError, step: str) -> None:
        """Wait before the next attempt, or raise ``error`` if there should be none."""
        self._failures += 1
        error.attempts = self._failures
        if not error.temporary or self._failures >= self._policy.attempts:
            raise error
        delay = min(self._policy.longest, self._policy.first * 2 ** (self._failures - 1))
        delay *= random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        if error.retry_after is not None:
            delay = min(self._policy.longest, max(delay, error.retry_after))
        if time.monotonic() + delay - self._began > self._policy.total:
            raise error
        if self._notify is not None:
            self._notify(step, error, self._failures, delay)
        if self._stop.wait(delay):
            raise error


class Caller:
    """Runs one driver's methods: whatever goes wrong is a `StoreError` that knows where it happened."""

    def __init__(self, driver: Driver, store: str) -> None:
        self.driver = driver
        self.store = store

    def __call__(
        self,
        operation: str,
        function: Callable[P, T],
        location: Location | None = None,
        image_id: str | None = None,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        try:
            return function(*args, **kwargs)
        except StoreError as error:
            self.place(error, operation, location, image_id)
            raise
        except Exception as error:
            ours = self.driver.translate(error)
            if ours is None:
                ours = StoreError(f"the driver failed with {type(error).__name__}: {error}")
            self.place(ours, operation, location, image_id)
            raise ours from error

    def next(self, operation: str, iterator: Iterator[bytes], location: Location) -> bytes:
        """The next chunk, or nothing at the end. The same as a call, and cheaper: it is made for every chunk."""
        try:
            return next(iterator, b"")
        except Exception as error:  # noqa: BLE001 - `__call__` sorts it out
            caught = error
        return self(operation, _raise, location, None, caught)

    def place(self, error: StoreError, operation: str, location: Location | None, image_id: str | None) -> None:
        """Say where ``error`` happened, as far as it does not know yet."""
        error.store = error.store or self.store
        error.driver = error.driver or self.driver.name
        error.operation = error.operation or operation
        error.image_id = error.image_id or image_id
        if error.location is None and location is not None:
            error.location = str(location)


def _raise(error: Exception) -> Never:
    raise error
