from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import threading

import pytest
from fake import Native, fake_store
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from imagestore import observers
from imagestore._models import (
    AbortFailed,
    BlockStored,
    CommitStarted,
    Event,
    Retried,
    TransferEnded,
    TransferStarted,
)
from imagestore.driver import Capabilities
from imagestore.errors import PermissionDenied, StoreError, Unavailable
from imagestore.observers import LoggingObserver, OpenTelemetryObserver

DATA = bytes(range(256)) * 10
COMMON = {"store": "fast", "driver": "rbd", "operation": "add", "image_id": "debian", "transfer": "t1"}


def at(kind, time, **values):
    return kind(**{**COMMON, "time": time, **values})


# Logging


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG, "imagestore.transfers")
    return lambda: [record for record in caplog.records if record.name == "imagestore.transfers"]


def test_a_transfer_in_the_log(log):
    store, backend = fake_store(observer=LoggingObserver())
    backend.script["write"] = [Unavailable("busy")]
    with store:
        store.add("debian", DATA, size=len(DATA))
    records = log()
    told = [(record.imagestore_event, record.levelname) for record in records]
    assert told[0] == ("TransferStarted", "DEBUG")
    assert sorted(told[1:-2]) == [("BlockStored", "DEBUG")] * 3 + [("Retried", "WARNING")]
    assert told[-2:] == [("CommitStarted", "DEBUG"), ("TransferEnded", "INFO")]
    first, last = records[0], records[-1]
    assert first.getMessage() == f"store s: add debian [{first.imagestore_transfer}] began, 2560 bytes"
    assert last.getMessage().startswith(f"store s: add debian [{first.imagestore_transfer}] done: 2560 bytes in ")
    assert (last.imagestore_store, last.imagestore_driver, last.imagestore_operation) == ("s", "fake", "add")
    assert (last.imagestore_image_id, last.imagestore_size, last.imagestore_stored) == ("debian", 2560, 2560)
    assert last.imagestore_digests.keys() == {"sha256"}
    retried = next(record for record in records if record.imagestore_event == "Retried")
    assert (retried.imagestore_step, retried.imagestore_attempt) == ("write", 1)
    assert "busy" in retried.getMessage()


def test_a_failed_transfer_in_the_log(log):
    store, backend = fake_store(observer=LoggingObserver())
    backend.script["write"] = [PermissionDenied("not you")]
    backend.script["abort"] = [PermissionDenied("nor this")]
    with store, pytest.raises(PermissionDenied):
        store.add("debian", DATA)
    ended = log()[-1]
    assert (ended.imagestore_event, ended.levelname) == ("TransferEnded", "WARNING")
    assert "failed after 0 bytes" in ended.getMessage()
    assert "not you" in ended.imagestore_error
    left = next(record for record in log() if record.imagestore_event == "AbortFailed")
    assert left.levelname == "ERROR"
    assert left.imagestore_token in left.getMessage()


EVENTS = [
    at(TransferStarted, 1.0, size=None),
    at(BlockStored, 1.5, index=0, bytes=10, stored=4, seconds=0.5),
    at(Retried, 2.0, step="write", error="busy", attempt=2, delay=0.25),
    at(CommitStarted, 2.5, size=10),
    at(AbortFailed, 2.6, token="f00", error="down"),
    at(TransferEnded, 3.0, size=10, stored=4, seconds=2.0, error=None, digests={"md5": "ab"}),
    at(TransferEnded, 3.0, size=10, stored=4, seconds=2.0, error="down"),
    Event(**COMMON, time=4.0),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_has_a_line_and_its_fields(event, log):
    LoggingObserver()(event)
    (record,) = log()
    text = record.getMessage()
    assert "store fast: add debian [t1]" in text
    assert "None" not in text
    kept = {name.removeprefix("imagestore_"): value for name, value in vars(record).items() if "imagestore_" in name}
    assert kept.pop("event") == type(event).__name__
    assert kept == {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    json.dumps(kept)


def test_strangers_cannot_forge_a_line(log):
    LoggingObserver()(at(Retried, 1.0, step="write", error="x\nERROR all\u2028is\x1b[2Jlost", attempt=1, delay=0.0))
    assert log()[0].getMessage().endswith(r"x\nERROR all\u2028is\x1b[2Jlost")


def test_levels_and_logger_can_be_chosen(caplog):
    observer = LoggingObserver(logging.getLogger("mine"), levels={TransferStarted: logging.INFO}, failed=logging.ERROR)
    caplog.set_level(logging.INFO, "mine")
    for event in EVENTS:
        observer(event)
    assert [(record.imagestore_event, record.levelname) for record in caplog.records] == [
        ("TransferStarted", "INFO"),
        ("Retried", "WARNING"),
        ("AbortFailed", "ERROR"),
        ("TransferEnded", "INFO"),
        ("TransferEnded", "ERROR"),
    ]


# OpenTelemetry


class Telemetry:
    def __init__(self):
        self.spans = InMemorySpanExporter()
        self.traces = TracerProvider()
        self.traces.add_span_processor(SimpleSpanProcessor(self.spans))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.observer = OpenTelemetryObserver(tracer_provider=self.traces, meter_provider=self.meters)

    def metrics(self):
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        (resource,) = data.resource_metrics
        (scope,) = resource.scope_metrics
        assert scope.scope.name == "imagestore"
        return {metric.name: metric for metric in scope.metrics}

    def points(self, name):
        metric = self.metrics().get(name)
        return [] if metric is None else [(dict(point.attributes), point) for point in metric.data.data_points]

    def total(self, name):
        return sum(getattr(point, "value", None) or getattr(point, "count", 0) for _, point in self.points(name))

    def span(self):
        (span,) = self.spans.get_finished_spans()
        return span

    def close(self):
        self.traces.shutdown()
        self.meters.shutdown()


@pytest.fixture
def telemetry():
    telemetry = Telemetry()
    yield telemetry
    telemetry.close()


def test_a_span_is_built_from_the_events(telemetry):
    for event in [*EVENTS[:4], EVENTS[5]]:
        telemetry.observer(event)
    span = telemetry.span()
    assert (span.name, span.kind) == ("add fast", SpanKind.INTERNAL)
    assert (span.start_time, span.end_time) == (1_000_000_000, 3_000_000_000)
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "imagestore.operation": "add",
        "imagestore.store": "fast",
        "imagestore.driver": "rbd",
        "imagestore.image.id": "debian",
        "imagestore.transfer.id": "t1",
        "imagestore.size": 10,
        "imagestore.stored": 4,
        "imagestore.blocks": 1,
        "imagestore.digest.md5": "ab",
    }
    assert [(event.name, event.timestamp, dict(event.attributes)) for event in span.events] == [
        (
            "imagestore.retry",
            2_000_000_000,
            {
                "imagestore.step": "write",
                "imagestore.attempt": 2,
                "imagestore.delay": 0.25,
                "exception.message": "busy",
                "error.type": "_OTHER",
            },
        ),
        ("imagestore.commit", 2_500_000_000, {"imagestore.size": 10}),
    ]


def test_metrics_of_an_add(telemetry):
    for event in [*EVENTS[:4], EVENTS[5]]:
        telemetry.observer(event)
    common = {"imagestore.operation": "add", "imagestore.store": "fast", "imagestore.driver": "rbd"}
    values = {
        name: [(attributes, point.value) for attributes, point in telemetry.points(name)]
        for name in telemetry.metrics()
        if name != "imagestore.transfer.duration"
    }
    assert values == {
        "imagestore.transfers": [(common, 1)],
        "imagestore.transfer.io": [(common, 10)],
        "imagestore.transfer.stored": [(common, 4)],
        "imagestore.retries": [({**common, "imagestore.step": "write", "error.type": "_OTHER"}, 1)],
    }
    ((attributes, point),) = telemetry.points("imagestore.transfer.duration")
    assert (attributes, point.count, point.sum) == (common, 1, 2.0)
    assert point.explicit_bounds[-1] >= 3600
    units = {metric.name: metric.unit for metric in telemetry.metrics().values()}
    assert units["imagestore.transfer.duration"] == "s"
    assert units["imagestore.transfer.io"] == "By"


def test_a_failure_in_span_and_metrics(telemetry):
    for event in [EVENTS[0], EVENTS[4], EVENTS[6]]:
        telemetry.observer(event)
    span = telemetry.span()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "down")
    assert span.attributes["error.type"] == "_OTHER"
    (event,) = span.events
    assert event.name == "imagestore.abort_failed"
    assert event.attributes["imagestore.upload.token"] == "f00"
    assert telemetry.total("imagestore.transfer.errors") == telemetry.total("imagestore.aborts.failed") == 1
    ((attributes, _),) = telemetry.points("imagestore.transfer.duration")
    assert attributes["error.type"] == "_OTHER"


def test_through_a_store(telemetry):
    store, backend = fake_store(Capabilities(sparse_unit=500, commit_proof=True), observer=telemetry.observer)
    backend.script["write"] = [None, Unavailable("busy")]
    with store:
        added = store.add("debian", b"x" * 1500 + bytes(70_500), size=72_000)
        assert added.stored < added.size
        with store.get(added.location) as image:
            assert len(image.read()) == 72_000
        with store.get(added.location, stop=100) as image:
            image.read()
        backend.script["chunk"] = [Native("odd")]
        with pytest.raises(StoreError):
            store.verify(added.location)
    add, whole, part, failed = telemetry.spans.get_finished_spans()
    assert add.name == "add s"
    assert add.attributes["imagestore.blocks"] == 72
    assert add.attributes["imagestore.stored"] == added.stored
    assert add.attributes["imagestore.digest.sha256"] == added.digests["sha256"]
    assert [event.name for event in add.events] == ["imagestore.retry", "imagestore.commit"]
    assert [span.attributes["imagestore.size"] for span in (whole, part, failed)] == [72_000, 100, 0]
    assert "imagestore.stored" not in whole.attributes
    assert failed.status.status_code is StatusCode.ERROR
    moved = {a["imagestore.operation"]: point.value for a, point in telemetry.points("imagestore.transfer.io")}
    assert (moved["add"], moved["get"]) == (72_000, 72_100)
    assert telemetry.total("imagestore.transfers") == 4
    assert telemetry.total("imagestore.transfer.errors") == 1
    assert telemetry.total("imagestore.transfer.stored") == added.stored
    assert telemetry.total("imagestore.retries") == 1
    assert not telemetry.observer._running


def test_metrics_tell_no_image_ids(telemetry):
    for number in range(50):
        for event in EVENTS:
            telemetry.observer(dataclasses.replace(event, image_id=f"i{number}", transfer=f"t{number}"))
    for name in telemetry.metrics():
        assert len(telemetry.points(name)) <= 2, name


def test_lost_events_are_made_up_for(telemetry):
    started, block, retried, _, left, ended = EVENTS[:6]
    # The end without the beginning, a block without it, and a beginning without an end.
    for event in (block, retried, left, ended):
        telemetry.observer(event)
    assert telemetry.total("imagestore.transfer.io") == 10
    assert telemetry.total("imagestore.transfer.stored") == 4
    assert telemetry.total("imagestore.retries") == 1
    assert not telemetry.spans.get_finished_spans()
    telemetry.observer(started)
    telemetry.observer(ended)
    assert telemetry.total("imagestore.transfer.io") == 20
    assert telemetry.total("imagestore.transfers") == 2


def test_transfers_in_flight_are_bounded(telemetry, monkeypatch):
    monkeypatch.setattr(observers, "IN_FLIGHT", 3)
    for number in range(10):
        telemetry.observer(TransferStarted(**{**COMMON, "transfer": f"t{number}"}, time=1.0, size=1))
    assert list(telemetry.observer._running) == ["t7", "t8", "t9"]
    assert [span.attributes["imagestore.transfer.id"] for span in telemetry.spans.get_finished_spans()] == [
        f"t{number}" for number in range(7)
    ]


def test_two_stores_share_an_observer(telemetry):
    def work(name):
        store, _ = fake_store(observer=telemetry.observer)
        with store:
            for number in range(50):
                store.add(f"{name}{number}", b"x" * 100)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(telemetry.spans.get_finished_spans()) == telemetry.total("imagestore.transfers") == 200
    assert telemetry.total("imagestore.transfer.io") == 20_000
    assert not telemetry.observer._running


def test_an_error_type_is_used_where_the_event_has_one():
    class Newer:
        error_type = "Unavailable"

    assert observers._error_type(Newer()) == {"error.type": "Unavailable"}


def test_the_global_providers_do_without_configuration():
    observer = OpenTelemetryObserver()
    for event in EVENTS:
        observer(event)
    assert not observer._running


def test_opentelemetry_is_imported_late_and_named_if_missing():
    code = """
import sys
import imagestore.observers as observers
assert not any(name.startswith("opentelemetry") for name in sys.modules)
observers.LoggingObserver()
sys.modules["opentelemetry"] = None
try:
    observers.OpenTelemetryObserver()
except Exception as error:
    print(type(error).__name__, error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("MissingDependency")
    assert "imagestore[otel]" in output


def test_a_span_belongs_to_the_span_of_the_call(telemetry):
    store, backend = fake_store(observer=telemetry.observer)
    backend.script["write"] = [PermissionDenied("no")]
    tracer = telemetry.traces.get_tracer("host")
    with store, tracer.start_as_current_span("request") as request, pytest.raises(PermissionDenied):
        store.add("debian", DATA)
    span = next(span for span in telemetry.spans.get_finished_spans() if span.name == "add s")
    assert span.parent.span_id == request.get_span_context().span_id
    assert span.attributes["error.type"] == "PermissionDenied"
