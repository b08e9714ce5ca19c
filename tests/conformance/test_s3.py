"""The kit on the S3 driver, against Ceph's RADOS gateway and against moto's server, a stand-in for Amazon S3."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

from imagestore import Retry, Store
from imagestore.driver import Driver, Hints, Timeouts
from imagestore.drivers.s3 import S3Driver
from imagestore.errors import (
    AlreadyExists,
    ConfigurationError,
    PermissionDenied,
    RateLimited,
    StoreError,
    StoreFull,
    Unauthenticated,
)
from imagestore.testing import DriverConformance, Harness, checks, run_check

pytest.importorskip("boto3", reason="the S3 driver needs boto3")

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _s3 import client, options, running
from faultproxy import FaultProxy

SLOW_DOWN = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class S3Harness(Harness):
    """A bucket of its own; a canary lies outside of the prefix and in another bucket."""

    processes = True
    sdk = ("boto3", "botocore", "urllib3", "swiftclient", "cinderclient", "pymongo", "requests")
    server: ClassVar[str]
    prefix: ClassVar[str] = "images/"
    settings: ClassVar[dict[str, Any]] = {}
    tls: ClassVar[bool] = False
    versioned: ClassVar[bool] = False
    strays: ClassVar[bool] = False

    def __init__(self) -> None:
        self.env = running(self.server)
        self.endpoint = self.env["S3_ENDPOINT_TLS" if self.tls else "S3_ENDPOINT"]
        self.bucket = f"kit-{uuid.uuid4().hex[:12]}"
        self.foreign: dict[str, bytes] = {}
        self.foreign_uploads: dict[tuple[str, str], int] = {}
        s3 = client(self.env)
        s3.create_bucket(Bucket=self.bucket)
        s3.create_bucket(Bucket=f"{self.bucket}-other")
        if self.versioned:
            s3.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})
        s3.close()

    def __getstate__(self) -> dict[str, Any]:
        # What a child process gets; sockets stay here.
        return {name: value for name, value in self.__dict__.items() if name not in ("silent", "proxy")}

    def values(self, **changes: Any) -> dict[str, Any]:
        return {
            "endpoint": self.endpoint,
            "region": self.env["S3_REGION"],
            "access_key": self.env["S3_ACCESS_KEY"],
            "secret_key": self.env["S3_SECRET_KEY"],
            "bucket": self.bucket,
            "prefix": self.prefix,
            "addressing": "path",
            "cacert": self.env["S3_CACERT"] if self.tls else None,
            **self.settings,
            **changes,
        }

    def make_driver(self) -> Driver:
        return S3Driver(options(**self.values()), store="kit", timeouts=Timeouts(connect=10, stall=30))

    def make_unreachable(self) -> Driver:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        return S3Driver(
            options(**self.values(endpoint=f"http://127.0.0.1:{port}")), timeouts=Timeouts(connect=1, stall=1)
        )

    def make_stalled(self) -> Driver:
        # The backlog takes connections, and nobody ever reads from them.
        self.silent = socket.create_server(("127.0.0.1", 0))
        port = self.silent.getsockname()[1]
        return S3Driver(
            options(**self.values(endpoint=f"http://127.0.0.1:{port}")), timeouts=Timeouts(connect=1, stall=1)
        )

    def close(self) -> None:
        """Take the buckets away, after a look whether anything of ours stayed in them."""
        if hasattr(self, "silent"):
            self.silent.close()
        # What a killed process had on its way may have come after its check looked.
        with Store(self.make_driver(), name="kit") as store:
            store.collect(older_than=0, include_alive=True)
            for image in store.list():
                if image.image_id.startswith("kit-kill-"):
                    store.delete(image.location)
        s3 = client(self.env)
        with contextlib.closing(s3):
            uploads = {
                (item["Key"], item["UploadId"]) for item in self._listed(s3, "list_multipart_uploads", "Uploads")
            }
            objects = {item["Key"] for item in self._listed(s3, "list_objects_v2", "Contents")}
            for key, upload in set(uploads):
                empty = not s3.list_parts(Bucket=self.bucket, Key=key, UploadId=upload).get("Parts")
                if self.strays and empty and "kit-kill-" in key:
                    uploads.discard((key, upload))
                s3.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)
            stayed = []
            for item in [
                *self._listed(s3, "list_object_versions", "Versions"),
                *self._listed(s3, "list_object_versions", "DeleteMarkers"),
            ]:
                if item["Key"].startswith(f"{self.prefix}.imagestore/") and item["Key"] not in self.foreign:
                    stayed.append(item["Key"])
                s3.delete_object(Bucket=self.bucket, Key=item["Key"], VersionId=item["VersionId"])
            for bucket in (self.bucket, f"{self.bucket}-other"):
                s3.delete_bucket(Bucket=bucket)
        features = f"{self.prefix}.imagestore/features"
        assert uploads == set(self.foreign_uploads), "multipart uploads stayed"
        assert objects <= {*self.foreign, features}, "objects stayed"
        assert set(stayed) <= {features}, "versions of marks stayed"

    def _listed(self, s3: Any, operation: str, what: str) -> list[dict[str, Any]]:
        pages = s3.get_paginator(operation).paginate(Bucket=self.bucket)
        return [item for page in pages for item in page.get(what, ())]

    def plant_foreign(self) -> Callable[[], None]:
        s3 = client(self.env)
        token = "0123456789abcdef" * 2
        own = f"{self.prefix}.imagestore/"
        names = (
            f"{self.prefix}sub/image", f"{self.prefix}.hidden", f"{self.prefix}a b", f"{self.prefix}~x", "else/where",
            f"{self.prefix[:-1]}x", f"{own}uploads", f"{own}uploads/", f"{own}uploads/{token}",
            f"{own}uploads/{token}-xyz", f"{own}uploads/{token}-01234567.bak", f"{own}uploads/{token}-01234567",
            f"{own}uploads/sub/{token}-01234567", f"{own}probe-", f"{own}probe-{token}.bak", f"{own}probe-{token}/x",
            f"{own}other", f"x/.imagestore/uploads/{token}-01234567",
        )  # fmt: skip
        for name in names:
            self.foreign[name] = name.encode()
            s3.put_object(Bucket=self.bucket, Key=name, Body=name.encode())
        # A mark that tells of no image id of ours, and uploads that nobody marked, with and without parts.
        for key, parts in (
            (f"{self.prefix}image", 1),
            (f"{self.prefix}empty", 0),
            (f"{self.prefix}sub/image", 1),
            (f"{own}uploads/{token}-01234567", 1),
            ("else/where", 1),
        ):
            if (key, parts) in [(known[0], count) for known, count in self.foreign_uploads.items()]:
                continue
            upload = s3.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]
            for number in range(1, parts + 1):
                s3.upload_part(Bucket=self.bucket, Key=key, UploadId=upload, PartNumber=number, Body=b"part")
            self.foreign_uploads[key, upload] = parts

        def untouched() -> None:
            for name in names:
                assert s3.get_object(Bucket=self.bucket, Key=name)["Body"].read() == name.encode(), name
            for (key, upload), parts in self.foreign_uploads.items():
                found = s3.list_parts(Bucket=self.bucket, Key=key, UploadId=upload).get("Parts", ())
                assert len(found) == parts, key

        return untouched

    def hostile_locations(self) -> Iterable[str]:
        host = self.endpoint.partition("://")[2]
        scheme = "s3+https" if self.tls else "s3"
        place = f"{host}/{self.bucket}/{self.prefix}"
        return (
            *([f"{scheme}://{host}/{self.bucket}/canary"] if self.prefix else ()),
            f"{scheme}://{host}/{self.bucket}-other/{self.prefix}canary",
            f"{scheme}://{host}/{self.bucket}/{self.prefix}../canary",
            f"{scheme}://{host}/{self.bucket}/{self.prefix}./canary",
            f"{scheme}://{host}/{self.bucket}/{self.prefix}/canary",
            f"{scheme}://{host}/{self.bucket}/{self.prefix}",
            f"{scheme}://{host}/{self.bucket}/",
            f"{scheme}://{host}/{self.bucket}",
            f"{scheme}://{host}/",
            f"{scheme}://{place}.imagestore/features",
            f"{scheme}://{place}.imagestore/uploads/{'0' * 32}-{'0' * 8}",
            f"{scheme}://{place}image?versionId=1",
            f"{scheme}://{place}image#x",
            f"{scheme}://{place}%2e%2e/canary",
            f"{scheme}://{place}sub/../../canary",
            f"{scheme}://evil.example/{self.bucket}/{self.prefix}image",
            f"{scheme}://{host}.evil.example/{self.bucket}/{self.prefix}image",
            f"{scheme}://evil.example/{place}image",
            f"{scheme}://{self.bucket}/{self.prefix}image",
            f"http://{place}image",
        )

    @contextlib.contextmanager
    def canary(self) -> Iterator[None]:
        s3 = client(self.env)
        places = [(self.bucket, "canary"), (f"{self.bucket}-other", f"{self.prefix}canary")]
        for bucket, key in places:
            s3.put_object(Bucket=bucket, Key=key, Body=b"alive")
        yield
        for bucket, key in places:
            assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == b"alive"
            s3.delete_object(Bucket=bucket, Key=key)
        s3.close()


class RgwHarness(S3Harness):
    """A real server. It ignores If-None-Match of CompleteMultipartUpload, which the driver has to find out."""

    server = "ceph"


class TestRgw(DriverConformance):
    harness = RgwHarness


class MotoHarness(S3Harness):
    """A stand-in for Amazon S3. All images at the root of the bucket."""

    server = "moto"
    prefix = ""
    kill_rounds = 2
    # It tells the same year 2010 for every upload, so that one whose client was killed within CreateMultipartUpload
    # can't be told from one of others.
    strays = True


class TestMoto(DriverConformance):
    harness = MotoHarness


class ProxiedHarness(RgwHarness):
    """With a proxy between driver and server, which can answer in the server's place."""

    def __init__(self) -> None:
        super().__init__()
        host, _, port = self.endpoint.partition("://")[2].partition(":")
        self.proxy = FaultProxy(host, int(port))
        self.endpoint = f"http://{self.proxy.host}:{self.proxy.port}"

    @contextlib.contextmanager
    def failing(self) -> Iterator[Callable[[], int]]:
        with self.proxy.answering(SLOW_DOWN) as requests:
            yield requests

    def close(self) -> None:
        super().close()
        self.proxy.close()


def test_rgw_no_hidden_retries() -> None:
    harness = ProxiedHarness()
    try:
        run_check(next(check for check in checks("discipline") if check.name == "no_hidden_retries"), harness)
    finally:
        harness.close()


@pytest.mark.parametrize(("server", "collision"), [("ceph", "detected"), ("moto", "exclusive")])
def test_finds_out_conditions(server: str, collision: str) -> None:
    harness = {"ceph": RgwHarness, "moto": MotoHarness}[server]()
    try:
        for _ in range(2):
            driver = harness.make_driver()
            driver.open()
            assert driver.capabilities.collision == collision
            driver.close()
    finally:
        harness.close()


class TlsHarness(RgwHarness):
    tls = True


class VersionedHarness(RgwHarness):
    versioned = True


class VersionedMotoHarness(MotoHarness):
    versioned = True


VERSIONS = (
    "contract.add_again",
    "contract.listing",
    "faults.replaced_while_reading",
    "leftovers.discard_twice",
)


@pytest.mark.parametrize(
    ("harness", "some"),
    [
        (TlsHarness, ("contract.image_several_blocks_and_some", "contract.ranges")),
        (VersionedHarness, VERSIONS),
        (VersionedMotoHarness, VERSIONS),
    ],
)
def test_some_of_it_elsewhere(harness: type[S3Harness], some: tuple[str, ...]) -> None:
    """With TLS the SDK sends other requests, and in a bucket with versions a delete is another thing."""
    wanted = [check for check in checks() if check.id in some]
    assert len(wanted) == len(some)
    made = harness()
    try:
        for check in wanted:
            run_check(check, made)
    finally:
        made.close()


@pytest.fixture
def rgw() -> Iterator[RgwHarness]:
    made = RgwHarness()
    try:
        yield made
    finally:
        made.close()


def opened(harness: S3Harness, **changes: Any) -> Store:
    driver = S3Driver(options(**harness.values(**changes)), timeouts=Timeouts(connect=5, stall=10))
    return Store(driver, name="s3", retry=Retry(attempts=1))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"secret_key": "wrong"}, Unauthenticated, "secret key"),
        ({"access_key": "NOBODY"}, Unauthenticated, "access key"),
        ({"bucket": "no-such-bucket"}, ConfigurationError, "bucket no-such-bucket"),
        ({"access_key": "S3_OTHER_ACCESS_KEY", "secret_key": "S3_OTHER_SECRET_KEY"}, PermissionDenied, "bucket kit-"),
    ],
)
def test_bad_settings(rgw: RgwHarness, changes: dict[str, str], error: type[StoreError], says: str) -> None:
    values = {name: rgw.env.get(value, value) for name, value in changes.items()}
    with opened(rgw, **values) as store, pytest.raises(error, match=says) as caught:
        store.exists("image")
    assert not caught.value.temporary
    assert rgw.env["S3_SECRET_KEY"] not in str(caught.value)


def test_clocks_that_differ(rgw: RgwHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore import auth

    now = auth.get_current_datetime
    monkeypatch.setattr(auth, "get_current_datetime", lambda *given, **told: now(*given, **told) + timedelta(hours=1))
    with opened(rgw) as store, pytest.raises(Unauthenticated, match="clocks") as caught:
        store.exists("image")
    assert not caught.value.temporary


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Slow Down"])
def test_asked_to_slow_down(status: str) -> None:
    harness = ProxiedHarness()
    try:
        with opened(harness) as store:
            store.exists("image")
            answer = f"HTTP/1.1 {status}\r\nRetry-After: 7\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            with harness.proxy.answering(answer.encode()), pytest.raises(RateLimited) as caught:
                store.exists("image")
            assert caught.value.retry_after == 7
            assert not store.exists("image")
    finally:
        harness.close()


def test_certificate_of_nobody(rgw: RgwHarness) -> None:
    with opened(rgw, endpoint=rgw.env["S3_ENDPOINT_TLS"]) as store, pytest.raises(ConfigurationError, match="cacert"):
        store.exists("image")


def test_bucket_is_created(rgw: RgwHarness) -> None:
    bucket = f"{rgw.bucket}-made"
    for _ in range(2):
        with opened(rgw, bucket=bucket, create_bucket=True) as store:
            store.delete(store.add("image", b"data").location)
    s3 = client(rgw.env)
    s3.delete_object(Bucket=bucket, Key=f"{rgw.prefix}.imagestore/features")
    s3.delete_bucket(Bucket=bucket)
    s3.close()


def test_quota(rgw: RgwHarness) -> None:
    """A quota that is used up is `StoreFull`, for one block and for many, and nothing stays."""
    admin = ("radosgw-admin", "quota")
    environment = {**os.environ, "CEPH_CONF": rgw.env["CEPH_CONF"]}
    bucket = (f"--bucket={rgw.bucket}", "--quota-scope=bucket", "--uid=tester")

    def quota(*arguments: str) -> None:
        subprocess.run([*admin, *arguments, *bucket], env=environment, check=True, capture_output=True, timeout=60)

    with opened(rgw) as store:
        store.exists("image")
        quota("set", "--max-size=7M")
        quota("enable")
        try:
            for size in (8 << 20, 30 << 20):
                with pytest.raises(StoreFull) as caught:
                    store.add("image", bytes(size))
                assert not caught.value.temporary
                assert not store.exists("image")
        finally:
            quota("disable")
        store.collect(older_than=0)
        assert not list(store.uploads())
        store.delete(store.add("image", b"room again").location)


@pytest.mark.parametrize("harness", [RgwHarness, MotoHarness])
def test_copy_and_sign(harness: type[S3Harness]) -> None:
    made = harness()
    driver = S3Driver(options(**made.values()))
    data = os.urandom(6 << 20)
    try:
        with Store(S3Driver(options(**made.values())), name="s3") as store:
            location = store.add("image", data).location
            driver.open()
            for count, size in enumerate((len(data), 0)):
                source = location if size else store.add("nothing", b"").location
                hints = Hints(token=f"{count:032x}", size=size, metadata={"os": "linux"})
                copied = driver.copy(source, f"copy-{count}", hints)
                stat = store.stat(copied)
                assert (stat.size, stat.token, stat.metadata) == (size, hints.token, {"os": "linux"})
                with store.get(copied) as reader:
                    assert reader.read() == data[:size]
                with pytest.raises(AlreadyExists):
                    driver.copy(source, f"copy-{count}", Hints(token="f" * 32, size=size))
                store.delete(copied)
                store.delete(source)
            location = store.add("image", data).location
            with urllib.request.urlopen(driver.sign(location, 60), timeout=10) as answer:
                assert answer.read() == data
            store.delete(location)
            assert not list(store.uploads())
    finally:
        driver.close()
        made.close()
