"""The kit on the GridFS driver, against MongoDB or DocumentDB."""

from __future__ import annotations

import contextlib
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("pymongo", reason="the GridFS driver needs pymongo")

import gridfs
from bson import ObjectId

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from mongodb_testing import REQUESTS, client, failing, options, remains, running

from imagestore import Retry, Store
from imagestore.driver import Driver, Timeouts
from imagestore.drivers.gridfs import GridFSDriver
from imagestore.errors import ConfigurationError, StoreError, Unauthenticated
from imagestore.testing import DriverConformance, Harness, checks, run_check

TOKEN = "0123456789abcdef" * 2


class GridFSHarness(Harness):
    """A database of its own; canaries lie in another bucket and in another database."""

    processes = True
    kill_rounds = 4
    sdk = ("boto3", "swiftclient", "cinderclient", "pymongo", "bson", "gridfs", "requests")
    bucket: ClassVar[str] = "fs"

    def __init__(self) -> None:
        self.env = running()
        self.database = f"kit_{uuid.uuid4().hex[:12]}"
        self.foreign: dict[str, set[Any]] = {"chunks": set(), "uploads": set()}
        self.mongo = client(self.env["MONGODB_URL"])

    def __getstate__(self) -> dict[str, Any]:
        # What a child process gets; sockets stay here.
        return {name: value for name, value in self.__dict__.items() if name not in ("mongo", "silent")}

    def values(self, **changes: Any) -> dict[str, Any]:
        return {"uri": self.env["MONGODB_URL"], "database": self.database, "bucket": self.bucket, **changes}

    def make_driver(self) -> Driver:
        return GridFSDriver(options(**self.values()), store="kit", timeouts=Timeouts(connect=10, stall=30))

    def make_unreachable(self) -> Driver:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        return self._elsewhere(port)

    def make_stalled(self) -> Driver:
        # The backlog takes connections, and nobody ever reads from them.
        self.silent = socket.create_server(("127.0.0.1", 0))
        return self._elsewhere(self.silent.getsockname()[1])

    def _elsewhere(self, port: int) -> Driver:
        values = self.values(uri=f"mongodb://127.0.0.1:{port}")
        return GridFSDriver(options(**values), timeouts=Timeouts(connect=1, stall=1))

    def close(self) -> None:
        """Take the databases away, after a look whether anything of ours stayed."""
        if hasattr(self, "silent"):
            self.silent.close()
        with self.mongo:
            left = remains(self.mongo[self.database], self.bucket)
            for name in (self.database, f"{self.database}_other"):
                self.mongo.drop_database(name)
        assert set(left["chunks"]) <= self.foreign["chunks"], "chunks stayed"
        assert not left["files"], "files stayed"
        assert {mark["_id"] for mark in left["uploads"]} <= self.foreign["uploads"], "marks stayed"

    @contextlib.contextmanager
    def failing(self) -> Iterator[Callable[[], int]]:
        with failing(self.env["MONGODB_URL"], ("find",), errorCode=91):
            before = REQUESTS.count["find"]
            yield lambda: REQUESTS.count["find"] - before

    def plant_foreign(self) -> Callable[[], None]:
        database = self.mongo[self.database]
        theirs = gridfs.GridFSBucket(database, bucket_name=self.bucket)
        theirs.upload_from_stream("report.pdf", b"report")
        theirs.upload_from_stream("odd.pdf", b"odd", metadata={"imagestore": "no", "image_id": "x"})
        theirs.upload_from_stream(f".imagestore-{TOKEN}.bak", b"odd", metadata={"imagestore": {}})
        orphan = ObjectId()
        self.foreign["chunks"].add(orphan)
        database[f"{self.bucket}.chunks"].insert_one({"files_id": orphan, "n": 0, "data": b"of an upload that runs"})
        now = datetime.now(UTC)
        whole = {"image_id": "x", "files_id": orphan, "started": now, "beat": now, "chunk_size": 9}
        marks: list[dict[str, Any]] = [
            {"_id": "of-another-tool", **whole},
            {"_id": ObjectId(), "imagestore": 1, **whole},
            {"_id": TOKEN, **whole},
            {"_id": TOKEN[::-1], "imagestore": 1},
        ]
        for mark in marks:
            self.foreign["uploads"].add(mark["_id"])
            database[f"{self.bucket}.uploads"].replace_one({"_id": mark["_id"]}, mark, upsert=True)
        database["other.uploads"].replace_one({"_id": TOKEN}, {"imagestore": 1, **whole}, upsert=True)

        def inventory() -> list[Any]:
            kinds = [f"{self.bucket}.uploads", "other.uploads"]
            files = list(
                database[f"{self.bucket}.files"].find({"filename": {"$regex": r"\.(pdf|bak)$"}}).sort("_id", 1)
            )
            ids = [*(file["_id"] for file in files), orphan]
            chunks = list(database[f"{self.bucket}.chunks"].find({"files_id": {"$in": ids}}).sort("_id", 1))
            known = {"_id": {"$in": [mark["_id"] for mark in marks]}}
            return [files, chunks, *(list(database[kind].find(known).sort("_id", 1)) for kind in kinds)]

        before = inventory()
        assert all(before)

        def untouched() -> None:
            assert inventory() == before

        return untouched

    def hostile_locations(self) -> Iterable[str]:
        return (
            "gridfs://host/canary",
            f"gridfs://{self.database}_other/canary",
            "gridfs://canary/",
            "gridfs:///canary",
            "gridfs://../canary",
            "gridfs://canary?bucket=other",
            "gridfs://canary#other",
            "gridfs://canary%00",
            "gridfs://%63anary",
            "gridfs://canary:27017",
            "gridfs://.imagestore-canary",
            "gridfs://{$gt:''}",
            f"gridfs://{self.env['MONGODB_URL']}",
            "mongodb://canary",
        )

    @contextlib.contextmanager
    def canary(self) -> Iterator[None]:
        here, there = self.mongo[self.database], self.mongo[f"{self.database}_other"]
        places = [here["other.files"], there[f"{self.bucket}.files"]]
        for place in places:
            place.insert_one({"_id": "canary", "length": 0, "chunkSize": 1})
        yield
        for place in places:
            assert place.delete_one({"_id": "canary", "length": 0}).deleted_count == 1


class TestGridFS(DriverConformance):
    harness = GridFSHarness


class SecuredHarness(GridFSHarness):
    """With TLS and a password."""

    bucket = "vm.images"

    def values(self, **changes: Any) -> dict[str, Any]:
        env = self.env
        secured = {
            "uri": env["MONGODB_TLS_URL"],
            "user": env["MONGODB_USER"],
            "password": env["MONGODB_PASSWORD"],
            "cacert": env["MONGODB_CACERT"],
        }
        return super().values(**{**secured, **changes})


SOME = (
    "contract.image_several_blocks_and_some",
    "contract.ranges",
    "contract.listing",
    "discipline.nothing_kept",
    "leftovers.add_killed_after",
    "locations.credentials",
)


@pytest.fixture
def secured() -> Iterator[SecuredHarness]:
    made = SecuredHarness()
    if "MONGODB_TLS_URL" not in made.env:
        made.close()
        pytest.skip(f"a server of the kind {made.env['MONGODB_KIND']} is started without TLS and passwords")
    try:
        yield made
    finally:
        made.close()


def test_some_of_it_with_tls_and_password(secured: SecuredHarness) -> None:
    for check in checks():
        if check.id in SOME:
            run_check(check, secured)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"password": "wrong-s3cr3t"}, Unauthenticated, "password"),
        ({"user": "nobody"}, Unauthenticated, "password"),
        ({"user": None, "password": None}, StoreError, "may not do this"),
        ({"cacert": "/etc/ssl/certs/ca-certificates.crt"}, ConfigurationError, "cacert"),
        ({"cacert": "/nowhere/ca.pem"}, ConfigurationError, "cacert"),
    ],
)
def test_bad_settings(secured: SecuredHarness, changes: dict[str, Any], error: type[StoreError], says: str) -> None:
    if changes == {"user": None, "password": None}:
        changes = {**changes, "uri": f"{secured.env['MONGODB_TLS_URL']}?tls=true"}
    driver = GridFSDriver(options(**secured.values(**changes)), timeouts=Timeouts(connect=2, stall=5))
    with Store(driver, retry=Retry(attempts=1)) as store, pytest.raises(error, match=says) as caught:
        store.exists("image")
    assert not caught.value.temporary
    for secret in (secured.env["MONGODB_PASSWORD"], "wrong-s3cr3t"):
        assert secret not in f"{caught.value!r} {caught.value.__cause__!r}"
