"""Ready observers: `LoggingObserver` for logs, `OpenTelemetryObserver` for traces and metrics.

Give one to ``open_store`` or ``load_stores`` (for all transfers) or to ``Store.add`` (for one call)::

    stores = load_stores("images.conf", observer=OpenTelemetryObserver())

They get their events in a thread of their own, late rather than never, so they can neither slow nor break a
transfer. Events may be missing: a transfer that is refused before it begins (the id is taken, there is no such
image) has none, and an observer that is much too slow loses some.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from imagestore._models import (
    AbortFailed,
    BlockStored,
    CommitStarted,
    Event,
    Retried,
    TransferEnded,
    TransferStarted,
)
from imagestore.driver import require

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

__all__ = ["LoggingObserver", "OpenTelemetryObserver"]

IN_FLIGHT: Final = 10_000
"""Transfers that an observer remembers at once. Beyond it the oldest is given up: the end of one may never be told."""


class LoggingObserver:
    """Writes a line for every event, to a logger of the standard library.

    Each record bears what the event says as attributes, for formatters that write structured logs: ``imagestore_event``
    (the event's class) and one for each of its fields, such as ``imagestore_transfer``, ``imagestore_image_id`` or
    ``imagestore_seconds``: text, numbers (bytes, seconds), None, and a dict of digests. What comes from elsewhere (an
    image id, a backend's message) stands in the text without control characters, so that it can't forge a line.
    """

    LEVELS: Final[Mapping[type[Event], int]] = {
        TransferStarted: logging.DEBUG,
        BlockStored: logging.DEBUG,
        CommitStarted: logging.DEBUG,
        Retried: logging.WARNING,
        AbortFailed: logging.ERROR,
        TransferEnded: logging.INFO,
    }
    """Levels by class of event. The end of a transfer that failed is one of `failed`."""

    def __init__(
        self,
        logger: logging.Logger | None = None,
        *,
        levels: Mapping[type[Event], int] | None = None,
        failed: int = logging.WARNING,
    ) -> None:
        """Log to ``logger`` (``imagestore.transfers`` by default), with ``levels`` in place of those in `LEVELS`."""
        self._logger = logger or logging.getLogger("imagestore.transfers")
        self._levels = {**self.LEVELS, **(levels or {})}
        self._failed = failed

    def __call__(self, event: Event, /) -> None:
        level = self._levels.get(type(event), logging.DEBUG)
        if isinstance(event, TransferEnded) and event.error is not None:
            level = self._failed
        if self._logger.isEnabledFor(level):
            extra: dict[str, Any] = {"imagestore_event": type(event).__name__}
            for field in dataclasses.fields(event):
                value = getattr(event, field.name)
                extra[f"imagestore_{field.name}"] = dict(value) if isinstance(value, Mapping) else value
            self._logger.log(level, "%s", _one_line(_sentence(event)), extra=extra)


def _sentence(event: Event) -> str:
    what = " ".join(part for part in (event.operation, event.image_id) if part)
    where = f"store {event.store}: {what} [{event.transfer}]"
    match event:
        case TransferStarted():
            return f"{where} began, {'size unknown' if event.size is None else f'{event.size} bytes'}"
        case BlockStored():
            return f"{where} block {event.index}: {event.stored} of {event.bytes} bytes in {event.seconds:.3f} s"
        case Retried():
            return f"{where} {event.step} failed, attempt {event.attempt}, again in {event.delay:.1f} s: {event.error}"
        case CommitStarted():
            return f"{where} commits {event.size} bytes"
        case AbortFailed():
            return f"{where} left upload {event.token} behind, for collect: {event.error}"
        case TransferEnded(error=None):
            return f"{where} done: {event.size} bytes in {event.seconds:.3f} s"
        case TransferEnded():
            return f"{where} failed after {event.size} bytes and {event.seconds:.3f} s: {event.error}"
        case _:
            return f"{where} {type(event).__name__}"


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


class OpenTelemetryObserver:
    """A span for every transfer, and metrics of all, by OpenTelemetry's API. Needs the extra ``otel``.

    **Spans** are named ``<operation> <store>``, such as ``add fast``, of kind INTERNAL (a backend's library may make
    CLIENT spans of its requests), with the events' times. Attributes: ``imagestore.operation``, ``imagestore.store``,
    ``imagestore.driver``, ``imagestore.image.id``, ``imagestore.transfer.id``, ``imagestore.size`` (bytes declared at
    first, those that moved at the end), ``imagestore.stored`` (bytes sent, without runs of zeros),
    ``imagestore.blocks`` (written) and ``imagestore.digest.<algorithm>``. A failed transfer has the status ERROR and
    ``error.type``. Span events: ``imagestore.retry`` (``imagestore.step``, ``imagestore.attempt``,
    ``imagestore.delay`` in seconds, ``error.type``, ``exception.message``), ``imagestore.commit`` and
    ``imagestore.abort_failed`` (``imagestore.upload.token``, ``error.type``, ``exception.message``).

    **Metrics** bear ``imagestore.operation``, ``imagestore.store`` and ``imagestore.driver``, never an image id:

    ================================= ============= ============ =====================================================
    name                              instrument    unit
    ================================= ============= ============ =====================================================
    ``imagestore.transfer.duration``  histogram     ``s``        with ``error.type`` if it failed
    ``imagestore.transfers``          counter       {transfer}   transfers that ended
    ``imagestore.transfer.errors``    counter       {error}      those that failed, with ``error.type``
    ``imagestore.transfer.io``        counter       ``By``       bytes of images moved, block by block for adds
    ``imagestore.transfer.stored``    counter       ``By``       bytes sent to the backend, without runs of zeros
    ``imagestore.retries``            counter       {retry}      with ``imagestore.step`` and ``error.type``
    ``imagestore.aborts.failed``      counter       {upload}     uploads left behind for ``collect``
    ================================= ============= ============ =====================================================

    ``error.type``, ``exception.message`` and the units are those of OpenTelemetry's semantic conventions
    (https://opentelemetry.io/docs/specs/semconv/), which have none for storing images; ``error.type`` is the class of
    the error, or ``_OTHER``. Every name that is ours begins with ``imagestore.``.
    """

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        """Use these providers, or the process's global ones. Raises `MissingDependency`."""
        from importlib.metadata import version

        self._trace = require("opentelemetry.trace", extra="otel")
        metrics = require("opentelemetry.metrics", extra="otel")
        self._tracer = self._trace.get_tracer("imagestore", version("imagestore"), tracer_provider)
        meter = metrics.get_meter("imagestore", version("imagestore"), meter_provider)
        # Images are large: the conventions' own boundaries end at ten seconds.
        self._duration = meter.create_histogram(
            "imagestore.transfer.duration",
            "s",
            "Time from the beginning of a transfer to its end",
            explicit_bucket_boundaries_advisory=[0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 14400],
        )
        self._transfers = meter.create_counter("imagestore.transfers", "{transfer}", "Transfers that ended")
        self._errors = meter.create_counter("imagestore.transfer.errors", "{error}", "Transfers that failed")
        self._io = meter.create_counter("imagestore.transfer.io", "By", "Bytes of images that moved")
        self._stored = meter.create_counter("imagestore.transfer.stored", "By", "Bytes sent to the backend")
        self._retries = meter.create_counter("imagestore.retries", "{retry}", "Attempts that are repeated")
        self._aborts = meter.create_counter("imagestore.aborts.failed", "{upload}", "Uploads left for collect")
        # A transfer's events come from one thread, but two stores may have two: single steps on this dict are safe.
        self._running: OrderedDict[str, _Running] = OrderedDict()

    def __call__(self, event: Event, /) -> None:
        match event:
            case TransferStarted():
                self._start(event)
            case BlockStored():
                self._block(event)
            case Retried():
                self._retry(event)
            case CommitStarted():
                self._note(event, "imagestore.commit", {"imagestore.size": event.size})
            case AbortFailed():
                self._aborts.add(1, _common(event))
                what = {"imagestore.upload.token": event.token, "exception.message": event.error}
                self._note(event, "imagestore.abort_failed", what | _error_type(event))
            case TransferEnded():
                self._end(event)
            case _:
                pass

    def _start(self, event: TransferStarted) -> None:
        attributes: dict[str, Any] = {**_common(event), "imagestore.transfer.id": event.transfer}
        if event.image_id is not None:
            attributes["imagestore.image.id"] = event.image_id
        if event.size is not None:
            attributes["imagestore.size"] = event.size
        name = f"{event.operation} {event.store}"
        span = self._tracer.start_span(name, attributes=attributes, start_time=_nanoseconds(event))
        self._running[event.transfer] = _Running(span)
        if len(self._running) > IN_FLIGHT:
            _, lost = self._running.popitem(last=False)
            lost.span.end()

    def _block(self, event: BlockStored) -> None:
        running = self._running.get(event.transfer)
        if running is not None:
            running.blocks += 1
            running.moved += event.bytes
            running.stored += event.stored
            self._io.add(event.bytes, _common(event))
            self._stored.add(event.stored, _common(event))

    def _retry(self, event: Retried) -> None:
        self._retries.add(1, {**_common(event), "imagestore.step": event.step, **_error_type(event)})
        what = {
            "imagestore.step": event.step,
            "imagestore.attempt": event.attempt,
            "imagestore.delay": event.delay,
            "exception.message": event.error,
        }
        self._note(event, "imagestore.retry", what | _error_type(event))

    def _note(self, event: Event, name: str, attributes: dict[str, Any]) -> None:
        running = self._running.get(event.transfer)
        if running is not None:
            running.span.add_event(name, attributes, _nanoseconds(event))

    def _end(self, event: TransferEnded) -> None:
        running = self._running.pop(event.transfer, None)
        common = _common(event)
        failure = {} if event.error is None else _error_type(event)
        self._duration.record(event.seconds, common | failure)
        self._transfers.add(1, common)
        if event.error is not None:
            self._errors.add(1, common | failure)
        # Reads tell of their bytes only here, and the events of some blocks may have been lost.
        self._io.add(max(0, event.size - (running.moved if running else 0)), common)
        self._stored.add(max(0, event.stored - (running.stored if running else 0)), common)
        if running is None:
            return
        span = running.span
        span.set_attributes({"imagestore.size": event.size, **failure})
        if event.operation == "add":
            span.set_attributes({"imagestore.stored": event.stored, "imagestore.blocks": running.blocks})
        span.set_attributes({f"imagestore.digest.{name}": value for name, value in event.digests.items()})
        if event.error is not None:
            span.set_status(self._trace.StatusCode.ERROR, event.error)
        span.end(_nanoseconds(event))


@dataclasses.dataclass(slots=True)
class _Running:
    """A transfer that has begun; `moved` and `stored` are the bytes counted so far."""

    span: Span
    blocks: int = 0
    moved: int = 0
    stored: int = 0


def _common(event: Event) -> dict[str, Any]:
    return {
        "imagestore.operation": event.operation,
        "imagestore.store": event.store,
        "imagestore.driver": event.driver,
    }


def _error_type(event: Event) -> dict[str, Any]:
    return {"error.type": getattr(event, "error_type", None) or "_OTHER"}


def _nanoseconds(event: Event) -> int:
    return int(event.time * 1e9)
