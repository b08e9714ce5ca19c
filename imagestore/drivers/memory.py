"""Images in memory, for tests and examples, in the manner of every backend that imagestore knows.

A *personality* says what the server can do and how an upload goes: a part of an object by index, a streamed put,
a volume that exists from the beginning. The images live in a `Backend` which several drivers may share, and which
survives them as a server survives its clients; it is gone with the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, Final, Self, cast
from urllib.parse import quote

from oslo_config import cfg

from imagestore.driver import (
    IMAGE_ID,
    Capabilities,
    Chunks,
    Driver,
    Hints,
    Leftover,
    Limits,
    Location,
    Options,
    Reading,
    Stat,
    StoredImage,
    Timeouts,
    Upload,
    Usage,
)
from imagestore.drivers._memory_server import Backend, BackendError, Client, Row
from imagestore.errors import (
    AlreadyExists,
    Changed,
    DigestMismatch,
    InUse,
    InvalidLocation,
    NotFound,
    RateLimited,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unauthenticated,
    Unavailable,
)

__all__ = ["PERSONALITIES", "Backend", "BackendError", "MemoryDriver"]

PERSONALITIES: Final = ("plain", "s3", "s3-unconditional", "swift", "cinder", "sheepdog", "gridfs", "vmware")

CHUNK: Final = 256 * 1024
_ZEROS: Final = bytes(CHUNK)
_USER: Final = "user:"

Piece = tuple[int, int, Callable[[], bytes]]
"""Where a piece of an image begins, its length, and what fetches it."""


class MemoryDriver(Driver):
    """A store in memory. ``MemoryDriver(settings)`` makes the subclass for the personality that is configured.

    Each has exactly the verbs of its backend: the subclasses make uploads, list and discard what these leave.

    Locations are ``memory://<store>/<image id>``: only the store's own name is accepted (``memory`` if it has none).
    """

    name = "memory"
    schemes = ("memory",)
    options = (
        cfg.StrOpt(
            "personality", default="plain", choices=PERSONALITIES, help="The backend whose ways the store takes on."
        ),
        cfg.IntOpt("capacity", min=0, help="How many bytes of images fit in; unset is no limit."),
        cfg.IntOpt(
            "block_size",
            min=1,
            help="Length in bytes of every block, where the personality has limits on blocks, so that they can be "
            "tried with small images. Unset: as the backend has them.",
        ),
        cfg.BoolOpt("require_auth", default=False, help="Refuse calls that act for nobody (cinder only)."),
    )

    table: ClassVar[str]
    """Where the images are on the server."""
    foreign: ClassVar[tuple[tuple[str, str, dict[str, str]], ...]] = ()
    """What other tools may have there and could be taken for ours: table, key, metadata."""
    client: Client

    def __new__(cls, settings: Options, /, **_arguments: Any) -> Self:
        made: type[Any] = cls
        if cls is MemoryDriver:
            from imagestore.drivers import _memory_personalities

            made = _memory_personalities.BY_NAME[getattr(settings, "personality", None) or "plain"]
        return cast("Self", super().__new__(made))

    def __init__(
        self,
        settings: Options,
        /,
        *,
        store: str = "",
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        backend: Backend | None = None,
    ) -> None:
        """``backend`` is the server to use; without one, the driver and its clones get one of their own.

        The option ``capacity`` is for the latter.
        """
        super().__init__(settings, store=store, limits=limits, timeouts=timeouts)
        self.backend = backend or Backend(getattr(settings, "capacity", None))
        self.block_size: int | None = getattr(settings, "block_size", None)
        self._root = f"memory://{quote(store or 'memory', safe='')}/"

    def clone(self) -> MemoryDriver:
        return type(self)(
            self.settings, store=self.store, limits=self.limits, timeouts=self.timeouts, backend=self.backend
        )

    def open(self) -> None:
        self.client = self.backend.connect()
        self.capabilities = self._capabilities()

    def close(self) -> None:
        """End the session with the server: what is unfinished counts as left behind by then."""
        if hasattr(self, "client"):
            self.client.close()

    def _capabilities(self) -> Capabilities:
        raise NotImplementedError

    # Locations

    def parse(self, uri: str, /) -> Location:
        scheme, separator, rest = uri.partition("://")
        uri = f"{scheme.lower()}{separator}{rest}"
        if not uri.startswith(self._root):
            raise InvalidLocation(f"not a location of this store: they begin with {self._root}")
        return self._location_of_key(uri[len(self._root) :])

    def _location_of_key(self, key: str) -> Location:
        """The location of what has the native key ``key``, which comes from a stranger."""
        if not IMAGE_ID.fullmatch(key):
            raise InvalidLocation("not a location: its last part is no image id")
        return self._location(key, key)

    def _location(self, key: str, image_id: str | None) -> Location:
        return Location(uri=self._root + key, key=(key,), image_id=image_id)

    # What every personality has

    def locate(self, image_id: str, /) -> Location | None:
        try:
            row = self.client.get(self.table, image_id)
        except BackendError as error:
            if error.code == "missing":
                return None
            raise
        return self._location(image_id, image_id) if self._is_image(row) else None

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        raise NotImplementedError

    def stat(self, location: Location, /) -> Stat:
        return self._stat(self._image(location))

    def read(self, location: Location, start: int, stop: int | None, /, version: str | None = None) -> Reading:
        row = self._image(location, version, pieces=True)
        return _reading(self._stat(row), self._pieces(row), start, row.size if stop is None else stop)

    def delete(self, location: Location, /) -> None:
        row = self._image(location)
        self.client.remove(self.table, row.key, uid=row.uid, if_free=True)

    def list(self) -> Iterator[StoredImage]:
        return iter([self._entry(row) for row in self.client.scan(self.table) if self._is_image(row)])

    def uploads(self) -> Iterator[Leftover]:
        return iter(list(self._leftovers()))

    def discard(self, leftover: Leftover, /) -> None:
        raise NotImplementedError

    def usage(self) -> Usage:
        total, used = self.client.usage()
        return Usage(total=total, used=used, free=None if total is None else total - used)

    def _leftovers(self) -> Iterable[Leftover]:
        raise NotImplementedError

    def plant_foreign(self) -> Callable[[], None]:
        """For tests: put things of other tools on the server, of every kind that could be taken for a leftover.

        Returns a function that raises `AssertionError` unless all are there still, unchanged.
        """
        stranger = self.backend.connect()
        for table, key, metadata in self.foreign:
            stranger.put(table, key, metadata=metadata, data=b"not ours")
        stranger.close()
        names = [(table, key) for table, key, _ in self.foreign]
        planted = self.backend.inventory()

        def check() -> None:
            now = self.backend.inventory()
            damaged = [name for name in names if now.get(name) != planted[name]]
            if damaged:
                raise AssertionError(f"things of other tools were touched: {damaged}")

        return check

    # What personalities change

    def _is_image(self, row: Row) -> bool:
        return IMAGE_ID.fullmatch(row.key) is not None

    def _image(self, location: Location, version: str | None = None, *, pieces: bool = False) -> Row:
        row = self.client.get(self.table, location.key[0], pieces=pieces)
        if not self._is_image(row):
            raise NotFound("there is no image there, at most an unfinished upload")
        if version is not None and row.etag != version:
            raise Changed(f"the image is of version {row.etag} now, not {version}")
        return row

    def _pieces(self, row: Row) -> Iterable[Piece]:
        """What an image consists of, ascending; what lies between reads as zeros."""
        for offset, data in sorted(row.pieces.items()):
            yield offset, len(data), partial(self.client.load, data)

    def _stat(self, row: Row) -> Stat:
        return Stat(
            size=row.size,
            version=row.etag,
            token=row.metadata.get("imagestore_token"),
            modified=_moment(row.touched),
            metadata={k.removeprefix(_USER): v for k, v in row.metadata.items() if k.startswith(_USER)},
        )

    def _entry(self, row: Row) -> StoredImage:
        return StoredImage(
            image_id=row.key, location=self._location(row.key, row.key), size=row.size, modified=_moment(row.touched)
        )

    def translate(self, error: Exception, /) -> StoreError | None:
        if not isinstance(error, BackendError):
            return None
        match error.code:
            case "exists":
                return AlreadyExists(f"the id is taken: {error}")
            case "missing":
                return NotFound(str(error))
            case "full":
                return StoreFull(str(error))
            case "busy":
                return InUse(str(error))
            case "bad-digest":
                return DigestMismatch(str(error), temporary=True)
            case "unauthenticated":
                return Unauthenticated(str(error))
            case "rate-limited":
                return RateLimited(str(error), retry_after=error.retry_after)
            case "timeout":
                return StoreTimeout(str(error))
            case "unavailable":
                return Unavailable(str(error))
            case "closed" | "invalid":
                return StoreError(str(error))


def user_metadata(hints: Hints) -> dict[str, str]:
    """The caller's metadata, apart from ours."""
    return {_USER + key: value for key, value in hints.metadata.items()}


def leftover(row: Row, token: str, *, image_id: str | None = None, held: int | None = None) -> Leftover:
    """A leftover whose mark is ``row``; ``held`` is what it holds in bytes, if that is elsewhere."""
    return Leftover(
        token=token,
        image_id=image_id or row.metadata.get("image_id"),
        bytes=row.stored if held is None else held,
        started=_moment(row.created),
        last_activity=_moment(row.touched),
        alive=row.alive,
        key=(row.table, row.key),
    )


def areas(pieces: Iterable[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of data, ascending, as areas between ``start`` and ``stop``; touching ones are one."""
    begin = end = -1
    for offset, length in pieces:
        low, high = max(offset, start), min(offset + length, stop)
        if low >= high:
            continue
        if low > end:
            if end > begin:
                yield begin, end
            begin = low
        end = max(end, high)
    if end > begin:
        yield begin, end


def _reading(stat: Stat, pieces: Iterable[Piece], start: int, stop: int) -> Reading:
    chunks = _Chunks(_cut(pieces, start, stop))
    return Reading(stat=stat, chunks=chunks, close=chunks.close)


class _Chunks(Chunks):
    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._pieces = pieces

    def fetch(self) -> bytes:
        return next(self._pieces, b"")

    def release(self) -> None:
        self._pieces = iter(())


def _cut(pieces: Iterable[Piece], position: int, stop: int) -> Iterator[bytes]:
    """The bytes from ``position`` to ``stop``, in chunks; zeros where there is no piece."""
    for offset, length, load in pieces:
        low, high = max(offset, position), min(offset + length, stop)
        if low >= high:
            continue
        while position < low:
            yield _ZEROS[: low - position]
            position += min(CHUNK, low - position)
        data = load()
        while position < high:
            chunk = data[position - offset : min(position + CHUNK, high) - offset]
            yield chunk
            position += len(chunk)
    while position < stop:
        yield _ZEROS[: stop - position]
        position += min(CHUNK, stop - position)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
