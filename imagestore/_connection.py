"""A store that is open: a driver, the one place where it is called, and threads. Made anew after a fork."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from imagestore._models import Location, Retry
from imagestore._retry import Backoff, Caller, Notify
from imagestore.driver import Capabilities, Driver, Verbs
from imagestore.errors import StoreError

__all__ = ["Borrowed", "Connection"]

T = TypeVar("T")


class Connection:
    """An opened driver and what is needed to use it.

    Attributes:
        verbs: the driver, as one that may have any verb.
    """

    def __init__(self, driver: Driver, store: str, retry: Retry, workers: int) -> None:
        self.driver = driver
        self.caller = Caller(driver, store)
        self.retry = retry
        self.workers = workers
        self.verbs = cast("Verbs", driver)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def capabilities(self) -> Capabilities:
        return self.driver.capabilities

    def has(self, verb: str) -> bool:
        return callable(getattr(self.driver, verb, None))

    def pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.workers, "imagestore-worker")
            return self._pool

    def retrying(
        self,
        operation: str,
        function: Callable[[], T],
        place: Location | None = None,
        *,
        image_id: str | None = None,
        notify: Notify | None = None,
        stop: threading.Event | None = None,
    ) -> T:
        """Call the driver; again after temporary errors, unless ``stop`` is set."""
        backoff = Backoff(self.retry, notify=notify, stop=stop)
        while True:
            try:
                return self.caller(operation, function, place, image_id)
            except StoreError as error:
                backoff.failed(error, operation)

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        self.caller("close", self.driver.close)


class Borrowed(Connection):
    """The same for a view that acts for a user: it has a driver of its own and borrows the threads."""

    def __init__(self, driver: Driver, owner: Connection) -> None:
        super().__init__(driver, owner.caller.store, owner.retry, owner.workers)
        self._owner = owner

    def pool(self) -> ThreadPoolExecutor:
        return self._owner.pool()

    def close(self) -> None:
        """What it borrowed belongs to the store."""
