"""Images in a GridFS bucket of MongoDB, or of a server that speaks its protocol.

An image is a standard GridFS file: a document in ``<bucket>.files`` and its bytes in ``<bucket>.chunks``, a document
for each block. Any GridFS library can read it. Its `_id` is a fresh ObjectId, because whatever is begun under an `_id`
that exists already mixes with, and on giving up destroys, what is there. The image id is the file's name and, with its
digests and the token of its upload, stands in ``metadata.imagestore``. Its location is ``gridfs://<image id>``: which
server, database and bucket is said by the configuration only.

Old releases of Glance made the image id the `_id` itself. Such files are read and deleted too.

**No clobber** rests on a unique index on ``metadata.imagestore.image_id``. It is sparse: files of others are not in it.

**The mark** of an upload, and of a delete that runs, is a document in ``<bucket>.uploads``. Its `_id` is the token.

**Commit** inserts the files document, complete but for the image id, checks that all chunks are there and that the mark
does not say ``discarding``, and sets the image id: that update is the step that makes an image. Who discards an upload
first writes ``discarding`` into the mark and then removes a files document without an image id. So whatever a late
request does, of the two only one finds what it needs, and chunks are removed only of what can't become an image.

Protocol: GridFS specification of the MongoDB drivers; error codes of the MongoDB server (``error_codes.yml``);
8000 and 16500 come from services that speak its protocol.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import threading
import time
import warnings
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote

from oslo_config import cfg

from imagestore.driver import (
    IMAGE_ID,
    Block,
    Capabilities,
    Chunks,
    Driver,
    Hints,
    Leftover,
    Location,
    Reading,
    Stat,
    StoredImage,
    Upload,
    require,
)
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    Changed,
    ConfigurationError,
    IntegrityError,
    InvalidLocation,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    RateLimited,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["GridFSDriver"]

_MIB: Final = 1024 * 1024
# A message, in either direction, must pass within one time-out, however slow the line: so messages are short.
_CHUNK: Final = _MIB
_BATCH: Final = 4 * _MIB
# Each takes three times its bytes on the way into a message; more at once gain nothing.
_PARALLEL: Final = 8
_REMOVED_AT_ONCE: Final = 512
_BEAT: Final = 30.0

_OURS: Final = "metadata.imagestore"
_IMAGE: Final = f"{_OURS}.image_id"
_MARK: Final = frozenset({"image_id", "files_id", "started", "beat", "chunk_size"})
_TOKEN: Final = re.compile(r"[0-9a-f]{32}")
_DATABASE: Final = re.compile(r"[^/\\. \"$*<>:|?\x00]{1,63}")
_BUCKET: Final = re.compile(r"(?!system\.)[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,98}[A-Za-z0-9_-])?")

_UNVERIFIED: Final = frozenset(
    {"tlsinsecure", "tlsallowinvalidcertificates", "tlsallowinvalidhostnames", "ssl_cert_reqs", "ssl_match_hostname"}
)

_CODES: Final[dict[int, tuple[type[StoreError], str]]] = {
    11: (Unauthenticated, "the server does not know the user"),
    18: (Unauthenticated, "the server does not accept user and password"),
    8000: (Unauthenticated, "the server does not accept user and password"),
    334: (Unauthenticated, "the server does not offer this way to authenticate: check authMechanism in option uri"),
    13: (PermissionDenied, "the user may not do this: it needs the rights that the documentation lists"),
    31: (PermissionDenied, "the user lacks a role"),
    14031: (StoreFull, "the server has no disk space left"),
    10334: (LimitExceeded, "the document is larger than the server can hold"),
    462: (RateLimited, "the server asks to slow down"),
    16500: (RateLimited, "the server asks to slow down"),
    50: (StoreTimeout, "the server did not finish in time"),
    64: (StoreTimeout, "the majority of the servers did not confirm in time"),
    89: (StoreTimeout, "a server did not answer another one"),
    202: (StoreTimeout, "a server did not answer another one"),
    262: (StoreTimeout, "the server did not finish in time"),
    59: (Unsupported, "the server does not know this command"),
    115: (Unsupported, "the server does not support this command"),
    67: (ConfigurationError, "an index can't be made"),
    79: (ConfigurationError, "the server knows no majority"),
    85: (ConfigurationError, "there is an index of the same keys or name that is another one: remove it"),
    86: (ConfigurationError, "there is an index of the same keys or name that is another one: remove it"),
    100: (ConfigurationError, "the replica set has too few members that store data for a majority"),
    6: (Unavailable, "a server can't be reached"),
    7: (Unavailable, "a server's name is not known"),
    24: (Unavailable, "the server is busy"),
    43: (Unavailable, "the server has forgotten the cursor"),
    46: (Unavailable, "the server is busy"),
    91: (Unavailable, "the server is being shut down"),
    112: (Unavailable, "two wrote at once"),
    134: (Unavailable, "the replica set is just being started"),
    189: (Unavailable, "the primary has stepped down"),
    237: (Unavailable, "the server has forgotten the cursor"),
    9001: (Unavailable, "the connection broke"),
    10107: (Unavailable, "the server is not the primary any more"),
    11000: (Unavailable, "two wrote at once"),
    11600: (Unavailable, "the server is being shut down"),
    11602: (Unavailable, "the primary has stepped down"),
    13388: (Unavailable, "the routing of the cluster has changed"),
    13435: (Unavailable, "the server is not the primary any more"),
    13436: (Unavailable, "the server is neither primary nor secondary"),
}


class GridFSDriver(Driver):
    """Images in a GridFS bucket. See the module for how."""

    name = "gridfs"
    schemes = ("gridfs",)
    options = (
        cfg.StrOpt(
            "uri",
            required=True,
            secret=True,
            help=(
                "Connection string of the server or replica set: mongodb://host1,host2/?replicaSet=rs0 or "
                "mongodb+srv://host. Its options for retries, time-outs, concerns and preferences have no effect: "
                "imagestore has its own."
            ),
        ),
        cfg.StrOpt("database", help="Database that holds the bucket. Not set: the one that uri names."),
        cfg.StrOpt(
            "bucket",
            default="fs",
            help="GridFS bucket: the collections <bucket>.files, <bucket>.chunks and <bucket>.uploads.",
        ),
        cfg.StrOpt(
            "user",
            help="User, where uri names none. The database that knows the user is authSource in uri, or else database.",
        ),
        cfg.StrOpt("password", secret=True, help="Password for user, as it is: nothing is decoded."),
        cfg.StrOpt(
            "cacert",
            help="File with the certificates of the authorities that are trusted. If it is set, TLS is used.",
        ),
    )

    def configure(self) -> None:
        settings = self.settings
        text: str = settings.uri or ""
        self._uri = text if "://" in text else f"mongodb://{text}"
        scheme, _, rest = self._uri.partition("://")
        if not rest or scheme not in ("mongodb", "mongodb+srv"):
            raise self.invalid_option("uri", "must be of the form mongodb://host or mongodb+srv://host")
        place, _, query = rest.partition("?")
        named = unquote(place.partition("/")[2])
        for name, value in parse_qsl(query):
            if name.lower() in _UNVERIFIED and value.lower() not in ("false", "cert_required"):
                raise self.invalid_option(
                    "uri", f"{name}: certificates are always verified; name the authority's cacert"
                )
            if name.lower() == "timeoutms":
                raise self.invalid_option("uri", "timeoutMS would end long reads: use [imagestore] timeout_stall")
        self._database: str = settings.database or named
        if not _DATABASE.fullmatch(self._database):
            raise self.invalid_option("database", "is missing, or not the name of a database")
        if not _BUCKET.fullmatch(settings.bucket or ""):
            raise self.invalid_option("bucket", "is missing, or not the name of a bucket")
        if bool(settings.user) != bool(settings.password):
            raise self.invalid_option("password", "must be set together with user")
        self._client: Any = None
        self._lock = threading.Lock()
        self._indexed = False

    # Connecting

    def open(self) -> None:
        """Connect, and see that the bucket can be read.

        Raises:
            ConfigurationError: the connection string is wrong, or the server's certificate is not trusted.
            Unauthenticated: the server does not accept user and password.
            PermissionDenied: the user may not read the bucket.
            Unavailable: no server that can be written to answers.
        """
        pymongo = require("pymongo", extra="gridfs")
        self._errors = require("pymongo.errors", extra="gridfs")
        self._bson = require("bson", extra="gridfs")
        self._client = self._connect(pymongo)
        try:
            self._database_of(pymongo)
            self._files.find_one({}, {"_id": 1})
        except BaseException:
            self.close()
            raise
        self.capabilities = Capabilities(
            parallel_writes=min(_PARALLEL, self.limits.workers),
            block_max=_CHUNK,
            repeatable_create=True,
            commit_proof=True,
        )

    def _connect(self, pymongo: Any) -> Any:
        settings, timeouts = self.settings, self.timeouts
        stall = max(1, int(timeouts.stall * 1000))
        connect = max(1, int(timeouts.connect * 1000))
        given: dict[str, Any] = {}
        if settings.user:
            given |= {"username": settings.user, "password": settings.password}
        if settings.cacert:
            given |= {"tls": True, "tlsCAFile": settings.cacert}
        try:
            with warnings.catch_warnings():
                # It only warns of an option that it does not know, or of a value that it will not use.
                warnings.simplefilter("error", UserWarning)
                return pymongo.MongoClient(
                    self._uri,
                    connect=False,
                    serverSelectionTimeoutMS=connect,
                    connectTimeoutMS=connect,
                    socketTimeoutMS=stall,
                    waitQueueTimeoutMS=stall,
                    # Reads hold connections beside the workers' writes.
                    maxPoolSize=2 * self.limits.workers,
                    retryWrites=False,
                    retryReads=False,
                    appname="imagestore",
                    **given,
                )
        except (self._errors.ConfigurationError, UserWarning) as error:
            raise ConfigurationError(f"option uri: {error}") from error
        except OSError as error:
            raise ConfigurationError(f"option cacert: {error.strerror or 'the file is of no use'}") from error
        except (ValueError, TypeError):
            # What it says may hold a part of a password that was taken for a port.
            raise ConfigurationError("option uri: user and password must be percent-encoded, a port a number") from None

    def _database_of(self, pymongo: Any) -> None:
        """The collections. Concerns are set here because GridFS classes pass them on to some operations only."""
        concern = require("pymongo.write_concern", extra="gridfs").WriteConcern
        read_concern = require("pymongo.read_concern", extra="gridfs").ReadConcern
        database = self._client.get_database(
            self._database,
            codec_options=self._bson.CodecOptions(tz_aware=True, tzinfo=UTC),
            read_preference=pymongo.ReadPreference.PRIMARY,
            read_concern=read_concern("majority"),
            write_concern=concern("majority", wtimeout=max(1, int(self.timeouts.stall * 1000))),
        )
        bucket = self.settings.bucket
        self._files = database[f"{bucket}.files"]
        self._chunks = database[f"{bucket}.chunks"]
        self._uploads = database[f"{bucket}.uploads"]
        # What is about to be removed must be seen also where the majority has not confirmed it yet.
        self._files_now = self._files.with_options(read_concern=read_concern("local"))
        self._chunks_now = self._chunks.with_options(read_concern=read_concern("local"))

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()

    def _make_indexes(self) -> None:
        """The two of the GridFS specification and our own, unless they are there: not everybody may make indexes."""
        with self._lock:
            if self._indexed:
                return
            for collection, keys, kind in (
                (self._files, {"filename": 1, "uploadDate": 1}, {}),
                (self._files, {_IMAGE: 1}, {"unique": True, "sparse": True}),
                (self._chunks, {"files_id": 1, "n": 1}, {"unique": True}),
            ):
                there = collection.index_information().values()
                if not any(
                    {name: int(way) for name, way in index["key"] if way in (1, -1)} == keys
                    and bool(index.get("unique")) >= ("unique" in kind)
                    for index in there
                ):
                    collection.create_index(list(keys.items()), **kind)
            self._indexed = True

    # Locations

    def parse(self, uri: str, /) -> Location:
        """Check a ``gridfs://<image id>`` location.

        Raises:
            InvalidLocation: another scheme, or anything but an image id.
        """
        scheme, separator, image_id = uri.partition("://")
        if not separator or scheme.lower() not in self.schemes or not IMAGE_ID.fullmatch(image_id):
            raise InvalidLocation("not a location of the form gridfs://<image id>")
        return self._location(image_id)

    def _location(self, image_id: str) -> Location:
        return Location(uri=f"gridfs://{image_id}", key=(image_id,), image_id=image_id)

    # Images

    def _find(self, image_id: str) -> dict[str, Any] | None:
        """The files document of an image: ours, or else one that Glance made."""
        found: list[dict[str, Any]] = list(self._files.find({"$or": [{_IMAGE: image_id}, {"_id": image_id}]}, limit=2))
        return max(found, key=lambda document: document["_id"] != image_id, default=None)

    def _image(self, location: Location, version: str | None = None) -> tuple[dict[str, Any], Stat]:
        document = self._find(location.key[0])
        if document is None:
            raise NotFound("there is no file of that image id in the bucket")
        stat = _stat(document)
        if version is not None and stat.version != version:
            raise Changed("the image was replaced")
        return document, stat

    def locate(self, image_id: str, /) -> Location | None:
        return self._location(image_id) if self._find(image_id) is not None else None

    def stat(self, location: Location, /) -> Stat:
        return self._image(location)[1]

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        """Open a part of an image.

        Raises:
            NotFound: there is no such image.
            Changed: it is another one than ``version``.
        """
        document, stat = self._image(location, version)
        chunks = _Chunks(self, document, start, stat.size if stop is None else min(stop, stat.size))
        return Reading(stat=stat, chunks=chunks, close=chunks.close)

    def list(self) -> Iterator[StoredImage]:
        wanted = {"$or": [{_IMAGE: {"$exists": True}}, {"_id": {"$type": "string"}}]}
        for document in self._files.find(wanted):
            image_id = _imagestore(document).get("image_id", document["_id"])
            if isinstance(image_id, str) and IMAGE_ID.fullmatch(image_id):
                stat = _stat(document)
                yield StoredImage(
                    image_id=image_id, location=self._location(image_id), size=stat.size, modified=stat.modified
                )

    # Writing and removing

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        """Write the mark. Repeated with the same token it finds the mark of before.

        Raises:
            InvalidRequest: the metadata can't be kept.
        """
        self._make_indexes()
        return _Upload(self, image_id, hints)

    def _mark(self, token: str, image_id: str, files_id: Any, **more: Any) -> dict[str, Any]:
        """Write a mark, unless there is one of this token; what it says."""
        told: dict[str, Any] = self._uploads.find_one_and_update(
            {"_id": token},
            {
                "$setOnInsert": {
                    "imagestore": 1,
                    "image_id": image_id,
                    "files_id": files_id,
                    "started": datetime.now(UTC),
                    **more,
                },
                "$currentDate": {"beat": True},
            },
            upsert=True,
            return_document=True,
        )
        return told

    def _forget(self, token: str) -> None:
        self._uploads.delete_one({"_id": token})

    def _remove_chunks(self, files_id: Any) -> None:
        """In parts: the server must be done with each within the time-out."""
        while last := self._chunks_now.find_one({"files_id": files_id}, {"n": 1}, sort=[("n", -1)]):
            self._chunks.delete_many({"files_id": files_id, "n": {"$gt": last["n"] - _REMOVED_AT_ONCE}})

    def _clear(self, token: str, files_id: Any) -> bool:
        """Remove all of an unfinished upload or delete but its mark. True if there is an image, which stays."""
        self._uploads.update_one({"_id": token}, {"$set": {"discarding": True}})
        self._files.delete_one({"_id": files_id, f"{_OURS}.token": token, _IMAGE: {"$exists": False}})
        if self._files_now.find_one({"_id": files_id}, {"_id": 1}) is not None:
            return True
        self._remove_chunks(files_id)
        return False

    def delete(self, location: Location, /) -> None:
        """Remove an image: the files document, which makes it one, and then the chunks.

        Raises:
            NotFound: there is no such image.
        """
        document, _ = self._image(location)
        token, files_id = secrets.token_hex(16), document["_id"]
        self._mark(token, location.key[0], files_id, chunk_size=document["chunkSize"])
        if not self._files.delete_one({"_id": files_id}).deleted_count:
            self._forget(token)
            raise NotFound("somebody else has just deleted the image")
        self._remove_chunks(files_id)
        self._forget(token)

    def uploads(self) -> Iterator[Leftover]:
        """Unfinished uploads and deletes. What one holds is told in whole chunks."""
        for mark in self._uploads.find({"imagestore": 1}):
            if not isinstance(mark["_id"], str) or not _TOKEN.fullmatch(mark["_id"]) or not mark.keys() >= _MARK:
                continue
            chunks = self._chunks.count_documents({"files_id": mark["files_id"]})
            yield Leftover(
                token=mark["_id"],
                image_id=mark["image_id"],
                bytes=chunks * mark["chunk_size"],
                started=mark["started"],
                last_activity=mark["beat"],
            )

    def discard(self, leftover: Leftover, /) -> None:
        mark = self._uploads.find_one({"_id": leftover.token, "imagestore": 1})
        if mark is not None:
            self._clear(leftover.token, mark["files_id"])
            self._forget(leftover.token)

    # Errors

    def translate(self, error: Exception, /) -> StoreError | None:
        if type(error).__module__.partition(".")[0] not in ("pymongo", "bson"):
            return InvalidRequest("the metadata are not text") if isinstance(error, UnicodeError) else None
        native = require("pymongo.errors", extra="gridfs")
        # What follows is a description of all servers.
        said = str(error).partition(", full error")[0].partition(", Timeout: ")[0][:500]
        if isinstance(error, native.ConnectionFailure):
            if "certificate verify failed" in said:
                return ConfigurationError(f"the server's certificate is not trusted: check option cacert: {said}")
            timed_out = isinstance(error, (native.NetworkTimeout, native.WaitQueueTimeoutError))
            kind: type[StoreError] = StoreTimeout if timed_out else Unavailable
            return kind(f"no answer from the server: {said}")
        if isinstance(error, native.InvalidOperation) and "after close" in said:
            return Cancelled("the store was closed")
        if isinstance(error, native.OperationFailure):
            known = _CODES.get(error.code or 0)
            if known is None and error.has_error_label("RetryableWriteError"):
                known = (Unavailable, "the server could not do it just now")
            found, meaning = known or (StoreError, "the server refused the request")
            return found(f"{meaning}: {said} (code {error.code})")
        if isinstance(error, native.ConfigurationError):
            return ConfigurationError(f"option uri: {said}")
        bson = require("bson.errors", extra="gridfs")
        if isinstance(error, (native.ProtocolError, bson.InvalidBSON)):
            return Unavailable(f"the server's answer can't be understood: {said}")
        if isinstance(error, bson.BSONError):
            return InvalidRequest(f"the metadata can't be kept: {said}")
        return None


class _Upload(Upload):
    """An image on its way into the bucket."""

    def __init__(self, driver: GridFSDriver, image_id: str, hints: Hints) -> None:
        self.location = driver._location(image_id)
        self._driver = driver
        self._image_id = image_id
        self._token = hints.token
        self._chunk_size = min(hints.block_size, _CHUNK)
        # Pairs, because names may have dots and dollars. They are in the mark too: what can't be kept fails early.
        self._metadata = [[name, value] for name, value in hints.metadata.items()]
        mark = driver._mark(
            hints.token,
            image_id,
            driver._bson.ObjectId(),
            chunk_size=self._chunk_size,
            metadata=self._metadata,
        )
        self._files_id = mark["files_id"]
        self._beat_due = time.monotonic() + _BEAT
        # Inserts that may still arrive: the chunks' numbers, -1 for the files document.
        self._doubt: set[int] = set()
        self._committed = False

    def _insert(self, collection: Any, number: int, document: dict[str, Any]) -> None:
        """Insert a document. One that is there already is this one, from an attempt whose answer was lost."""
        errors = self._driver._errors
        try:
            collection.insert_one(document)
        except errors.DuplicateKeyError:
            pass
        except errors.ConnectionFailure:
            self._doubt.add(number)
            raise
        self._doubt.discard(number)

    def _beat(self) -> None:
        """Show that the upload is alive. Raises `NotFound` if it was discarded."""
        self._beat_due = time.monotonic() + _BEAT
        alive = self._driver._uploads.update_one(
            {"_id": self._token, "discarding": {"$exists": False}}, {"$currentDate": {"beat": True}}
        )
        if not alive.matched_count:
            raise NotFound("the upload was discarded")

    def write(self, block: Block, /) -> None:
        """Insert a chunk.

        Raises:
            NotFound: the upload was discarded. That may also be noticed as late as in `commit`.
        """
        number, odd = divmod(block.offset, self._chunk_size)
        if odd or len(block.data) > self._chunk_size or (len(block.data) < self._chunk_size and not block.last):
            raise StoreError(f"a block of {len(block.data)} bytes at {block.offset} is no chunk")
        if time.monotonic() >= self._beat_due:
            self._beat()
        self._insert(self._driver._chunks, number, {"files_id": self._files_id, "n": number, "data": block.data})

    def commit(self, size: int, /) -> None:
        """Make a file of the chunks, and an image of the file.

        Raises:
            AlreadyExists: the id was taken meanwhile.
            NotFound: the upload was discarded.
            IntegrityError: chunks that the server had confirmed are not there.
        """
        if self._committed:
            return
        driver = self._driver
        self._insert(
            driver._files,
            -1,
            {
                "_id": self._files_id,
                "length": driver._bson.Int64(size),
                "chunkSize": self._chunk_size,
                "uploadDate": datetime.now(UTC),
                "filename": f".imagestore-{self._token}",
                "metadata": {
                    "imagestore": {"token": self._token, "metadata": self._metadata, "digests": dict(self.digests)}
                },
            },
        )
        # The majority has confirmed that insert, and with it all before it.
        chunks = driver._chunks.count_documents({"files_id": self._files_id})
        self._beat()
        if chunks != -(-size // self._chunk_size):
            raise IntegrityError(f"the server has {chunks} chunks of {self._chunk_size} bytes, for {size} bytes")
        self._publish()
        self._committed = True
        # The image stands. A mark that can't be removed is a leftover like any other.
        with contextlib.suppress(Exception):
            driver._forget(self._token)

    def _publish(self) -> None:
        driver = self._driver
        try:
            done = driver._files.update_one(
                {"_id": self._files_id, _IMAGE: {"$exists": False}},
                {"$set": {_IMAGE: self._image_id, "filename": self._image_id}, "$currentDate": {"uploadDate": True}},
            )
        except driver._errors.DuplicateKeyError as error:
            raise AlreadyExists("there is an image of that id already") from error
        if not done.matched_count and driver._files_now.find_one({"_id": self._files_id}, {"_id": 1}) is None:
            raise NotFound("the upload was discarded")

    def abort(self) -> None:
        """Remove chunks, files document and mark. What was committed stays.

        Raises:
            Unavailable: (not temporary) a request whose answer was lost may still arrive, so that the mark was kept.
        """
        if not self._driver._clear(self._token, self._files_id) and self._doubt:
            raise Unavailable("what became of a request is not known: the upload is left for collect", temporary=False)
        self._driver._forget(self._token)


class _Chunks(Chunks):
    """The bytes of a file from ``start`` to ``stop``, chunk by chunk; an error where one is missing."""

    def __init__(self, driver: GridFSDriver, document: dict[str, Any], start: int, stop: int) -> None:
        super().__init__()
        self._driver = driver
        self._files_id = document["_id"]
        self._size: int = document["chunkSize"]
        self._length: int = document["length"]
        self._position = start
        self._stop = stop
        wanted = {"$gte": start // self._size, "$lte": max(stop - 1, 0) // self._size}
        self._cursor = (
            driver._chunks.find({"files_id": self._files_id, "n": wanted}, {"_id": 0, "n": 1, "data": 1})
            .sort("n", 1)
            .batch_size(max(1, _BATCH // self._size))
        )

    def fetch(self) -> bytes:
        if self._position >= self._stop:
            return b""
        number = self._position // self._size
        first = number * self._size
        chunk = next(self._cursor, None)
        if chunk is None or chunk["n"] != number or len(chunk["data"]) != min(self._size, self._length - first):
            raise self._missing(number)
        data: bytes = chunk["data"][self._position - first : self._stop - first]
        self._position += len(data)
        return data

    def _missing(self, number: int) -> StoreError:
        if self._driver._files_now.find_one({"_id": self._files_id}, {"_id": 1}) is None:
            return Unavailable("the image was deleted while it was read")
        return IntegrityError(f"chunk {number} of the image is missing or has a wrong length")

    def release(self) -> None:
        """End the cursor in the server."""
        self._cursor.close()


def _imagestore(document: dict[str, Any]) -> dict[str, Any]:
    """What we wrote into a files document; nothing, where others wrote it."""
    metadata = document.get("metadata")
    ours = metadata.get("imagestore") if isinstance(metadata, dict) else None
    return ours if isinstance(ours, dict) else {}


def _stat(document: dict[str, Any]) -> Stat:
    length, modified, ours = document.get("length"), document.get("uploadDate"), _imagestore(document)
    size = document.get("chunkSize")
    if not isinstance(length, int) or not isinstance(size, int) or length < 0 or size < 1:
        raise IntegrityError("the files document has no length or chunkSize")
    date = modified if isinstance(modified, datetime) else None
    return Stat(
        size=length,
        # Others may use an _id again.
        version=str(document["_id"]) if ours else f"{length}-{date}-{document.get('md5', '')}",
        token=ours.get("token"),
        modified=date,
        metadata=dict(ours.get("metadata", ())),
    )
