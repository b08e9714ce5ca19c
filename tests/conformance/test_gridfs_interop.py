"""GridFS files that others wrote, ours as others see them, and files that are damaged."""

from __future__ import annotations

import hashlib
import io
import random
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pymongo", reason="the GridFS driver needs pymongo")

import gridfs
from bson import ObjectId

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from mongodb_testing import REQUESTS, client, failing, options, remains, running

from imagestore import Retry, Store, load_stores, open_store
from imagestore.driver import Block, Hints
from imagestore.drivers import gridfs as driver_module
from imagestore.drivers.gridfs import GridFSDriver
from imagestore.errors import (
    AlreadyExists,
    ConfigurationError,
    IntegrityError,
    NotFound,
    PermissionDenied,
    StoreError,
)

MIB = 1024 * 1024
DATA = random.Random(7).randbytes(3 * MIB + 12_345)


class Place:
    """A database, our store in it, and pymongo's own GridFS."""

    def __init__(self) -> None:
        self.env = running()
        self.mongo = client(self.env["MONGODB_URL"])
        self.name = f"interop_{uuid.uuid4().hex[:12]}"
        self.database = self.mongo[self.name]
        self.store = self.opened()
        self.theirs = gridfs.GridFSBucket(self.database)

    def opened(self, **changes: Any) -> Store:
        values = {"uri": self.env["MONGODB_URL"], "database": self.name, **changes}
        return Store(GridFSDriver(options(**values)), name="gridfs", retry=Retry(attempts=2, first=0.01))

    def read(self, location: Any, start: int = 0, stop: int | None = None) -> bytes:
        with self.store.get(location, start=start, stop=stop) as reader:
            return b"".join(reader)

    def close(self) -> None:
        self.store.close()
        self.mongo.drop_database(self.name)
        self.mongo.close()


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("length", [0, 1, MIB, len(DATA)])
def test_others_read_and_delete_ours(place: Place, length: int) -> None:
    image_id = str(uuid.uuid4())
    result = place.store.add(image_id, DATA[:length], metadata={"os.name": "a $mall one"})
    (found,) = place.theirs.find({"filename": image_id})
    assert isinstance(found._id, ObjectId)
    assert (found.length, found.chunk_size) == (length, MIB)
    told = found.metadata["imagestore"]
    assert (told["image_id"], told["digests"]) == (image_id, {"sha256": hashlib.sha256(DATA[:length]).hexdigest()})
    assert abs((found.upload_date - result.stat.modified).total_seconds()) < 60
    assert place.theirs.open_download_stream(found._id).read() == DATA[:length]
    out = io.BytesIO()
    place.theirs.download_to_stream_by_name(image_id, out)
    assert out.getvalue() == DATA[:length]
    assert result.stat.metadata == {"os.name": "a $mall one"}
    place.theirs.delete(found._id)
    with pytest.raises(NotFound):
        place.store.get(result.location)
    assert remains(place.database) == {"chunks": [], "files": [], "uploads": []}


def test_indexes_are_those_of_the_specification(place: Place) -> None:
    place.store.add("image", DATA[:10])
    files = place.database["fs.files"].index_information().values()
    chunks = place.database["fs.chunks"].index_information().values()
    assert [("filename", 1), ("uploadDate", 1)] in [index["key"] for index in files]
    assert [index["unique"] for index in chunks if index["key"] == [("files_id", 1), ("n", 1)]] == [True]
    assert [
        (index["unique"], index["sparse"]) for index in files if index["key"] == [("metadata.imagestore.image_id", 1)]
    ] == [(True, True)]
    # pymongo looks whether they are there before its first upload.
    place.theirs.upload_from_stream("theirs", DATA[:10])


@pytest.mark.parametrize("chunk_size", [1000, 261_120, 3 * MIB])
def test_what_others_wrote(place: Place, chunk_size: int) -> None:
    image_id = str(uuid.uuid4())
    with place.theirs.open_upload_stream_with_id(image_id, "debian.qcow2", chunk_size) as file:
        file.write(DATA)
    location = place.store.locate(image_id)
    assert location.uri == f"gridfs://{image_id}"
    assert place.read(location) == DATA
    for start, stop in ((0, 1), (chunk_size - 1, chunk_size + 1), (chunk_size, 2 * chunk_size), (len(DATA) - 5, None)):
        assert place.read(location, start, stop) == DATA[start:stop]
    place.store.delete(location)
    assert remains(place.database) == {"chunks": [], "files": [], "uploads": []}


def test_images_of_old_glance(place: Place, tmp_path: Path) -> None:
    """It used the class GridFS with the image id as _id and told no name; servers kept an MD5 then."""
    ids = [str(uuid.uuid4()) for _ in range(2)]
    old = gridfs.GridFS(place.database)
    old.put(DATA, _id=ids[0])
    old.put(b"", _id=ids[1])
    place.database["fs.files"].update_one({"_id": ids[0]}, {"$set": {"md5": "0" * 32}})
    conf = tmp_path / "glance-api.conf"
    conf.write_text(
        "[DEFAULT]\nenabled_backends = old:gridfs\n[glance_store]\ndefault_backend = old\n[old]\n"
        f"mongodb_store_uri = {place.env['MONGODB_URL']}\nmongodb_store_db = {place.name}\n"
    )
    with load_stores(str(conf)) as stores:
        store = stores["old"]
        ours = store.add("ours", DATA[:10]).location
        assert {image.image_id: image.size for image in store.list()} == {ids[0]: len(DATA), ids[1]: 0, "ours": 10}
        with pytest.raises(AlreadyExists):
            store.add(ids[0], b"other")
        for image_id, data in zip(ids, (DATA, b""), strict=True):
            stat = store.stat(f"gridfs://{image_id}")
            assert (stat.size, stat.token) == (len(data), None)
            assert stat.version is not None
            with store.get(f"gridfs://{image_id}") as reader:
                assert reader.read() == data
            store.delete(f"gridfs://{image_id}")
            with pytest.raises(NotFound):
                store.stat(f"gridfs://{image_id}")
        store.delete(ours)
    assert remains(place.database) == {"chunks": [], "files": [], "uploads": []}


def test_another_image_under_the_same_old_id(place: Place) -> None:
    old = gridfs.GridFS(place.database)
    old.put(b"one", _id="image")
    before = place.store.stat("gridfs://image").version
    old.delete("image")
    old.put(b"two", _id="image")
    assert place.store.stat("gridfs://image").version != before


@pytest.mark.parametrize("damage", ["missing", "last missing", "short", "long"])
def test_damaged_chunks(place: Place, damage: str) -> None:
    location = place.store.add("image", DATA).location
    chunks = place.database["fs.chunks"]
    number = 3 if damage == "last missing" else 1
    if damage.endswith("missing"):
        assert chunks.delete_one({"n": number}).deleted_count == 1
    else:
        data = DATA[number * MIB : (number + 1) * MIB]
        other = data[:-1] if damage == "short" else data + b"x"
        assert chunks.update_one({"n": number}, {"$set": {"data": other}}).modified_count == 1
    with pytest.raises(IntegrityError, match=f"chunk {number} "):
        place.read(location)
    assert place.read(location, stop=number * MIB) == DATA[: number * MIB]


def test_chunk_lost_before_the_commit(place: Place) -> None:
    """What the server had confirmed and lost is found out before the image is visible."""
    chunks = place.database["fs.chunks"]

    def source() -> Iterator[bytes]:
        yield DATA[: 2 * MIB]
        for _ in range(1000):
            if chunks.delete_one({"n": 0}).deleted_count:
                break
            time.sleep(0.01)
        yield DATA[2 * MIB :]

    with pytest.raises(IntegrityError, match="3 chunks"):
        place.store.add("image", source())
    assert not place.store.exists("image")
    assert remains(place.database) == {"chunks": [], "files": [], "uploads": []}


def test_damaged_files_document(place: Place) -> None:
    place.database["fs.files"].insert_one({"_id": "image", "length": "long"})
    with pytest.raises(IntegrityError):
        place.store.stat("gridfs://image")


def test_deleted_while_it_is_read(place: Place) -> None:
    """A chunk that is gone because the image was deleted is no damage."""
    location = place.store.add("image", DATA * 4).location
    with place.store.get(location) as reader:
        assert reader.read(10) == DATA[:10]
        place.store.delete(location)
        # What the server has sent already, or keeps for an open cursor, may still come.
        try:
            rest = reader.read()
        except NotFound:
            return
        assert rest == (DATA * 4)[10:]


def test_index_of_others_in_the_way(place: Place) -> None:
    place.database["fs.files"].create_index([("metadata.imagestore.image_id", 1)])
    with pytest.raises(ConfigurationError, match="index"):
        place.store.add("image", b"data")


def test_metadata_that_cannot_be_kept(place: Place) -> None:
    with pytest.raises(StoreError, match="metadata"):
        place.store.add("image", b"data", metadata={"name": "\ud800"})
    assert remains(place.database) == {"chunks": [], "files": [], "uploads": []}


def test_several_blocks_with_other_stores(place: Place, tmp_path: Path) -> None:
    """Added to a store of longer blocks at the same time, its blocks are cut into chunks."""
    conf = tmp_path / "imagestore.conf"
    conf.write_text(
        "[DEFAULT]\nenabled_backends = here:file, there:gridfs\n[imagestore]\ndefault_backend = here\n"
        f"[here]\ndatadir = {tmp_path}/images\n[there]\nuri = {place.env['MONGODB_URL']}\ndatabase = {place.name}\n"
    )
    with load_stores(str(conf)) as stores:
        done = stores.add("image", [DATA], to=["here", "there"])
        assert not done.errors
        assert place.read("gridfs://image") == DATA


def test_open_store(place: Place) -> None:
    with open_store("gridfs", uri=place.env["MONGODB_URL"], database=place.name, bucket="other") as store:
        location = store.add("image", DATA).location
        assert place.database["other.files"].count_documents({}) == 1
        with pytest.raises(NotFound):
            place.store.get(location)


def test_concerns_reach_the_server(place: Place) -> None:
    place.store.exists("x")
    with REQUESTS.keeping() as commands:
        location = place.store.add("image", DATA).location
        assert place.read(location) == DATA
        place.store.delete(location)
    writes = [command for command in commands if {"insert", "update", "delete", "findAndModify"} & command.keys()]
    assert len(writes) >= 4 + 2 + 2
    for command in writes:
        assert command["writeConcern"]["w"] == "majority", command
    reads = [command for command in commands if {"find", "aggregate"} & command.keys()]
    assert {"fs.files", "fs.chunks"} == {command.get("find") or command.get("aggregate") for command in reads}
    for command in reads:
        # Only who is about to remove must not miss what the majority has not confirmed yet.
        last = command.get("sort") == {"n": -1}
        assert command["readConcern"]["level"] == ("local" if last else "majority"), command
    for command in commands:
        assert command.get("$readPreference", {"mode": "primary"})["mode"] == "primary"
        assert "txnNumber" not in command, "pymongo would retry"


def test_who_may_not_make_indexes(place: Place) -> None:
    """They are made once, and not needed for reading."""
    gridfs.GridFS(place.database).put(DATA, _id="old")
    with failing(place.env["MONGODB_URL"], ("createIndexes",), errorCode=13):
        assert place.read("gridfs://old") == DATA
        with pytest.raises(PermissionDenied, match="rights"):
            place.store.add("image", DATA)
    place.store.add("image", DATA)
    before = REQUESTS.count["createIndexes"]
    with place.opened() as other:
        other.add("image-2", DATA)
    assert REQUESTS.count["createIndexes"] == before


def test_beat(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that runs shows that it is alive, and notices early that it was discarded."""
    driver = GridFSDriver(options(uri=place.env["MONGODB_URL"], database=place.name))
    driver.open()
    monkeypatch.setattr(driver_module, "_BEAT", 0.0)
    try:
        upload = driver.create("image", Hints(token="0" * 32, block_size=10))
        (first,) = driver.uploads()
        upload.write(Block(index=0, offset=0, data=b"0123456789"))
        (second,) = driver.uploads()
        assert first.last_activity is not None
        assert second.last_activity is not None
        assert second.last_activity > first.last_activity
        assert (first.started, first.bytes, second.bytes) == (second.started, 0, 10)
        driver.discard(second)
        with pytest.raises(NotFound):
            upload.write(Block(index=1, offset=10, data=b"0123456789"))
        upload.abort()
        assert remains(place.database) == {"chunks": [], "files": [], "uploads": []}
    finally:
        driver.close()


def test_chunks_are_removed_in_parts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    location = place.store.add("image", DATA).location
    monkeypatch.setattr(driver_module, "_REMOVED_AT_ONCE", 3)
    with REQUESTS.keeping() as commands:
        place.store.delete(location)
    assert sum(command.get("delete") == "fs.chunks" for command in commands) == 2
    assert remains(place.database) == {"chunks": [], "files": [], "uploads": []}
