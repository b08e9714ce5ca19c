"""The GridFS driver without a server: options, locations, errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pymongo", reason="the GridFS driver needs pymongo")

import bson.errors
import pymongo.errors as native

from imagestore import errors
from imagestore.driver import Block, Hints, Options, Timeouts
from imagestore.drivers.gridfs import GridFSDriver


def make(**values: Any) -> GridFSDriver:
    defaults = {option.dest: option.default for option in GridFSDriver.options}
    given = {"uri": "mongodb://db.example/", "database": "images", **values}
    return GridFSDriver(Options({**defaults, **given}), store="test", timeouts=Timeouts(connect=0.2, stall=0.2))


@pytest.mark.parametrize(
    ("values", "database"),
    [
        ({"uri": "mongodb://a,b:27018/glance?replicaSet=rs0", "database": None}, "glance"),
        ({"uri": "mongodb://a/glance"}, "images"),
        ({"uri": "mongodb://a/%67lance", "database": None}, "glance"),
        ({"uri": "mongodb+srv://user:p%40ss@a.example/?tls=true"}, "images"),
        ({"uri": "a.example:27017"}, "images"),
        ({"uri": "mongodb://a/?tlsInsecure=false&ssl_cert_reqs=CERT_REQUIRED"}, "images"),
        ({"user": "me", "password": "secret", "bucket": "vm.images-2"}, "images"),
    ],
)
def test_options(values: dict[str, Any], database: str) -> None:
    driver = make(**values)
    assert driver._database == database
    assert driver._uri.startswith("mongodb")
    assert "secret" not in repr(driver.settings)


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"uri": ""}, "uri"),
        ({"uri": "http://user:s3cr3t@a/"}, "uri"),
        ({"uri": "mongodb://"}, "uri"),
        ({"uri": "mongodb://user:s3cr3t@a/?tlsInsecure=true"}, "uri"),
        ({"uri": "mongodb://a/?tls=true&tlsAllowInvalidCertificates=true"}, "uri"),
        ({"uri": "mongodb://a?tlsAllowInvalidHostnames=TRUE"}, "uri"),
        ({"uri": "mongodb://a/?ssl_cert_reqs=CERT_NONE"}, "uri"),
        ({"uri": "mongodb://a/?timeoutMS=5000"}, "uri"),
        ({"database": None}, "database"),
        ({"database": "a.b"}, "database"),
        ({"database": "x" * 64}, "database"),
        ({"bucket": ""}, "bucket"),
        ({"bucket": "a$b"}, "bucket"),
        ({"bucket": "system.x"}, "bucket"),
        ({"bucket": "x."}, "bucket"),
        ({"user": "me"}, "password"),
        ({"password": "s3cr3t"}, "password"),
    ],
)
def test_bad_options(values: dict[str, Any], option: str) -> None:
    with pytest.raises(errors.InvalidOption, match=f"option {option}: ") as caught:
        make(**values)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://user:s3c/r3t@host/",
        "mongodb://user:s3cr3t:x@host:port/",
        "mongodb://user:s3cr3t@host:99999/",
        "mongodb://us%zz:s3cr3t@host/",
        "mongodb://host/?authMechanism=NONE-SUCH",
        "mongodb://host/?w=-1",
        "mongodb://host/?tlsCAFil=ca.pem",
    ],
)
def test_a_connection_string_that_pymongo_refuses(uri: str) -> None:
    driver = make(uri=uri)
    with pytest.raises(errors.ConfigurationError, match="option uri") as caught:
        driver.open()
    assert "s3c" not in f"{caught.value} {caught.value.__cause__!r}"


def test_no_authorities(tmp_path: Path) -> None:
    for cacert in (tmp_path / "missing.pem", tmp_path):
        with pytest.raises(errors.ConfigurationError):
            make(cacert=str(cacert)).open()


def test_locations() -> None:
    driver = make()
    for text in ("gridfs://an-image", "GridFS://an-image"):
        location = driver.parse(text)
        assert (location.uri, location.key, location.image_id) == ("gridfs://an-image", ("an-image",), "an-image")
    for text in (
        "gridfs://",
        "gridfs:///a",
        "gridfs://a/",
        "gridfs://a/b",
        "gridfs://.a",
        "gridfs:a",
        "mongodb://a",
        "a",
    ):
        with pytest.raises(errors.InvalidLocation):
            driver.parse(text)


def refused(code: int, labels: tuple[str, ...] = ()) -> native.OperationFailure:
    return native.OperationFailure("because", code, {"errorLabels": list(labels)})


@pytest.mark.parametrize(
    ("error", "kind", "temporary"),
    [
        (native.AutoReconnect("connection closed"), errors.Unavailable, True),
        (native.ServerSelectionTimeoutError("refused, Timeout: 1s, Topology …"), errors.Unavailable, True),
        (native.ServerSelectionTimeoutError("SSL: certificate verify failed"), errors.ConfigurationError, False),
        (native.NotPrimaryError("not primary"), errors.Unavailable, True),
        (native.NetworkTimeout("timed out"), errors.StoreTimeout, True),
        (native.WaitQueueTimeoutError("no connection"), errors.StoreTimeout, True),
        (native.WTimeoutError("waiting for replication timed out", 64), errors.StoreTimeout, True),
        (native.CursorNotFound("cursor id 1 not found", 43), errors.Unavailable, True),
        (native.DuplicateKeyError("E11000", 11000), errors.Unavailable, True),
        (native.ExecutionTimeout("too long", 50), errors.StoreTimeout, True),
        (refused(18), errors.Unauthenticated, False),
        (refused(13), errors.PermissionDenied, False),
        (refused(14031), errors.StoreFull, False),
        (refused(16500), errors.RateLimited, True),
        (refused(10107), errors.Unavailable, True),
        (refused(91), errors.Unavailable, True),
        (refused(86), errors.ConfigurationError, False),
        (refused(59), errors.Unsupported, False),
        (refused(77777, ("RetryableWriteError",)), errors.Unavailable, True),
        (refused(77777), errors.StoreError, False),
        (native.InvalidOperation("Cannot use MongoClient after close"), errors.Cancelled, False),
        (native.ConfigurationError("The DNS query name does not exist"), errors.ConfigurationError, False),
        (native.ProtocolError("response id 7"), errors.Unavailable, True),
        (bson.errors.InvalidBSON("bad eoo"), errors.Unavailable, True),
        (bson.errors.InvalidStringData("not UTF-8"), errors.InvalidRequest, False),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), errors.InvalidRequest, False),
    ],
)
def test_errors(error: Exception, kind: type[errors.StoreError], temporary: bool) -> None:
    ours = make().translate(error)
    assert type(ours) is kind
    assert ours.temporary is temporary
    assert "Topology" not in str(ours)


def test_errors_of_others() -> None:
    assert make().translate(ValueError("x")) is None
    assert make().translate(native.InvalidName("x")) is None


def test_nothing_is_imported_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymongo", None)
    driver = make()
    driver.close()
    with pytest.raises(errors.MissingDependency, match=r"imagestore\[gridfs\]"):
        driver.open()


def test_blocks_that_are_no_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would become another image than was sent."""
    driver = make()
    driver._bson, driver._indexed = bson, True
    begun: Callable[..., Any] = lambda token, image_id, files_id, **more: {"files_id": files_id}  # noqa: E731
    monkeypatch.setattr(driver, "_mark", begun)
    upload = driver.create("image", Hints(token="0" * 32, block_size=64))
    for block in (
        Block(index=1, offset=1, data=bytes(64)),
        Block(index=0, offset=0, data=bytes(65)),
        Block(index=0, offset=0, data=bytes(63)),
    ):
        with pytest.raises(errors.StoreError, match="no chunk"):
            upload.write(block)
