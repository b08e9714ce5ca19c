"""Images of a pool, open for reading, and their bytes."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from imagestore.driver import Chunks, Stat
from imagestore.drivers._rbd_cluster import MEANING, SNAPSHOT, Pool
from imagestore.errors import Changed, NotFound, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["METADATA", "ImageChunks", "OpenImage", "OpenImages", "record_of", "time_of"]

METADATA: Final = "imagestore"
_TOKEN: Final = re.compile(r"[0-9a-f]{32}")

# Longer ones make librados' own memory grow by a multiple of them.
_PIECE: Final = 1024 * 1024
_PIECES: Final = 12
_IDLE_IMAGES: Final = 8


class OpenImage:
    """An image open for reading at its snapshot; or at its head, if it has no ``snap`` and the location tells none.

    Attributes:
        key: pool, name and snapshot that were asked for.
        handle: librbd's.
    """

    def __init__(self, pool: Pool, name: str, snapshot: str) -> None:
        self.key = (pool, name, snapshot)
        self._pool = pool
        self._name = name
        rbd = pool.sdk.rbd
        internal = pool.committed(name)
        if internal is None:
            raise NotFound("there is no such image")
        self._internal = internal
        self._snap_id: int | None = None
        try:
            self.handle = pool.open(internal, snapshot or SNAPSHOT, read_only=True)
        except rbd.ImageNotFound as error:
            if snapshot:
                raise NotFound("the image has no such snapshot") from error
            self.handle = pool.open(internal, read_only=True)
        else:
            self._snap_id = self.handle.snap_get_id(snapshot or SNAPSHOT)
        pool.cluster.join(self)
        try:
            self.stat = self._look()
        except BaseException:
            self.close()
            raise

    def _look(self) -> Stat:
        handle, size = self.handle, self.handle.size()
        told = record_of(handle)
        if self._snap_id is None:
            version, modified = f"{self._internal}-{size:x}", handle.modify_timestamp()
        else:
            version, modified = f"{self._internal}-{self._snap_id:x}", handle.get_snap_timestamp(self._snap_id)
        return Stat(
            size=size,
            version=version,
            token=None if told is None else told["token"],
            modified=time_of(modified),
            metadata={} if told is None else told["metadata"],
        )

    def require(self, version: str | None) -> None:
        if version is not None and version != self.stat.version:
            raise Changed("the image was replaced")

    def fresh(self) -> bool:
        """Whether the name still means this image."""
        return self._pool.id_of(self._name) == self._internal and self._there()

    def check(self) -> None:
        """See that what was read until now was the image. Raises `Unavailable` if it may be gone."""
        there = self._there() if self._snap_id is not None else self.fresh()
        if not there:
            raise Unavailable("the image was deleted or replaced while it was read")

    def _there(self) -> bool:
        try:
            snapshots = self._pool.snapshots(self._internal)
        except NotFound:
            return False
        return self._snap_id is None or self._snap_id in snapshots

    def areas(self, start: int, stop: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []

        def take(offset: int, length: int, exists: bool) -> None:
            begin, end = max(offset, start), min(offset + length, stop)
            if not exists or begin >= end:
                return
            if found and begin <= found[-1][1]:
                found[-1] = (found[-1][0], end)
            else:
                found.append((begin, end))

        self.handle.diff_iterate(start, stop - start, None, take, include_parent=True, whole_object=True)
        return found

    def close(self) -> None:
        self._pool.cluster.close(self.handle)
        self._pool.cluster.leave(self)


class OpenImages:
    """Images that were open for reading a moment ago: a ranged read of one costs no new opening."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[OpenImage] = []
        self._closed = False

    @contextlib.contextmanager
    def use(self, pool: Pool, name: str, snapshot: str) -> Iterator[OpenImage]:
        image = self.take(pool, name, snapshot)
        try:
            yield image
        finally:
            self.give(image)

    def take(self, pool: Pool, name: str, snapshot: str) -> OpenImage:
        """An image, as it is now. Raises `NotFound`."""
        key = (pool, name, snapshot)
        with self._lock:
            found = next((image for image in self._idle if image.key == key), None)
            if found is not None:
                self._idle.remove(found)
        if found is not None:
            try:
                if found.fresh():
                    return found
            except BaseException:
                found.close()
                raise
            found.close()
        return OpenImage(pool, name, snapshot)

    def give(self, image: OpenImage) -> None:
        with self._lock:
            surplus = image
            if not self._closed:
                self._idle.append(image)
                if len(self._idle) <= _IDLE_IMAGES:
                    return
                surplus = self._idle.pop(0)
        surplus.close()

    def clear(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for image in idle:
            image.close()

    def close(self) -> None:
        """What is in use is closed when it comes back."""
        self._closed = True
        self.clear()


class _Piece:
    """A request for a piece of an image."""

    def __init__(self, handle: Any, offset: int, length: int) -> None:
        self.length = length
        self.sure = False
        # The request holds its callback: if that held this object too, the ring of them would keep librbd's buffers
        # until a garbage collection.
        arrived: list[bytes | None] = []
        self._arrived = arrived
        self.request = handle.aio_read(offset, length, lambda _, data: arrived.append(data))

    def wait(self) -> None:
        self.request.wait_for_complete_and_cb()

    def result(self) -> bytes:
        [data] = self._arrived
        if data is None:
            kind, text = MEANING.get(-self.request.get_return_value(), (Unavailable, "the cluster can't read this"))
            raise kind(text) if kind is not NotFound else Unavailable("the image was deleted while it was read")
        if len(data) != self.length:
            raise Changed("the image became shorter while it was read")
        return data


class ImageChunks(Chunks):
    """The bytes from ``start`` to ``stop``, with several requests on their way."""

    def __init__(self, image: OpenImage, start: int, stop: int, images: OpenImages) -> None:
        super().__init__()
        self._image = image
        self._next = start
        self._stop = stop
        self._images = images
        self._pending: deque[_Piece] = deque()

    def fetch(self) -> bytes:
        self._ask()
        if not self._pending:
            return b""
        piece = self._pending[0]
        piece.wait()
        data = piece.result()
        if not piece.sure:
            self._make_sure()
        self._pending.popleft()
        return data

    def _ask(self) -> None:
        while self._next < self._stop and len(self._pending) < _PIECES:
            length = min(_PIECE - self._next % _PIECE, self._stop - self._next)
            self._pending.append(_Piece(self._image.handle, self._next, length))
            self._next += length

    def _make_sure(self) -> None:
        # Only what has arrived before the question is asked is covered by its answer.
        arrived = [piece for piece in self._pending if piece.request.is_complete()]
        self._image.check()
        for piece in arrived:
            piece.sure = True

    def release(self) -> None:
        for piece in self._pending:
            piece.wait()
        self._pending.clear()
        self._images.give(self._image)


def record_of(image: Any) -> dict[str, Any] | None:
    """What an upload of ours wrote into the image's metadata; None for images of others."""
    try:
        told = json.loads(image.metadata_get(METADATA))
    except (KeyError, ValueError):
        return None
    known = (
        isinstance(told, dict)
        and isinstance(told.get("token"), str)
        and isinstance(told.get("metadata"), dict)
        and _TOKEN.fullmatch(told["token"])
    )
    return told if known else None


def time_of(told: datetime | None) -> datetime | None:
    """A time as librbd tells it: in UTC, without saying so, and 1970 where there is none."""
    moment = None if told is None else told.replace(tzinfo=UTC)
    return moment if moment is not None and moment.timestamp() > 0 else None
