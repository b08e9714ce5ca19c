"""What a transfer tells the outside: events for observers, progress, and what it hears from there: cancel."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from imagestore._models import (
    AbortFailed,
    BlockStored,
    CommitStarted,
    Event,
    Observer,
    Progress,
    Retried,
    TransferEnded,
    TransferStarted,
)
from imagestore._pool import Engine
from imagestore.errors import Cancelled, StoreError, redact

__all__ = ["Record", "canceller", "quiet"]

_log = logging.getLogger("imagestore")


class Record:
    """The events of one transfer."""

    def __init__(
        self,
        operation: str,
        image_id: str | None,
        *,
        store: str,
        driver: str,
        engine: Engine,
        observers: Iterable[Observer | None],
    ) -> None:
        self._engine = engine
        self._observers = [observer for observer in observers if observer is not None]
        self._began = time.monotonic()
        self._context = contextvars.copy_context()
        self._lock = threading.Lock()
        self.size = 0
        self.stored = 0
        self.digests: Mapping[str, str] = {}
        self._common: dict[str, Any] = {
            "store": store,
            "driver": driver,
            "operation": operation,
            "image_id": image_id,
            "transfer": secrets.token_hex(8) if self._observers else "",
        }

    def _send(self, kind: type[Event], **values: Any) -> None:
        for observer in self._observers:
            self._engine.observe(observer, kind(**self._common, time=time.time(), **values), self._context)

    def started(self, size: int | None) -> None:
        self._send(TransferStarted, size=size)

    @contextlib.contextmanager
    def running(self, size: int | None) -> Iterator[None]:
        self.started(size)
        try:
            yield
        except BaseException as error:
            self.ended(error)
            raise
        self.ended(None)

    def block(self, index: int, length: int, stored: int, seconds: float) -> None:
        with self._lock:
            self.size += length
            self.stored += stored
        self._send(BlockStored, index=index, bytes=length, stored=stored, seconds=seconds)

    def retried(self, step: str, error: StoreError, attempt: int, delay: float) -> None:
        store = self._common["store"]
        _log.info("store %s: %s failed, attempt %d, again in %.1f s: %s", store, step, attempt, delay, error)
        self._send(Retried, step=step, error=str(error), attempt=attempt, delay=delay, error_type=type(error).__name__)

    def read(self, error: BaseException | None, length: int) -> None:
        self.size = length
        self.ended(error)

    def commit(self, size: int) -> None:
        self._send(CommitStarted, size=size)

    def abort_failed(self, token: str, error: StoreError) -> None:
        self._send(AbortFailed, token=token, error=str(error), error_type=type(error).__name__)

    def ended(self, error: BaseException | None) -> None:
        text = None if error is None else redact(str(error) or type(error).__name__)
        self._send(
            TransferEnded,
            size=self.size,
            stored=self.stored,
            seconds=time.monotonic() - self._began,
            error=text,
            error_type=None if error is None else type(error).__name__,
            digests=dict(self.digests),
        )


def canceller(cancel: threading.Event | None) -> Callable[[], None]:
    def check() -> None:
        if cancel is not None and cancel.is_set():
            raise Cancelled("the caller cancelled")

    return check


def quiet(progress: Progress | None) -> Progress | None:
    """A progress function that can't break a transfer: after its first failure it is called no more."""
    if progress is None:
        return None
    active = progress
    failed = False

    def report(done: int, total: int | None) -> None:
        nonlocal failed
        if failed:
            return
        try:
            active(done, total)
        except Exception:  # noqa: BLE001 - logged; the caller's code can't be allowed to break a transfer
            failed = True
            _log.exception("the progress function failed and is not called again")

    return report
