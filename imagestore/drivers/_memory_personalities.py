"""What the memory driver can be. Each personality is a driver and the upload that it makes, in the order of use."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from imagestore.driver import (
    IMAGE_ID,
    Block,
    Capabilities,
    Hints,
    Leftover,
    Location,
    PullReader,
    PullUpload,
    StoredImage,
    Upload,
)
from imagestore.drivers._memory_server import BackendError, Code, Row, fresh
from imagestore.drivers.memory import MemoryDriver, Piece, areas, leftover, user_metadata
from imagestore.errors import (
    AlreadyExists,
    InvalidImageId,
    InvalidLocation,
    NotFound,
    SizeMismatch,
    Unauthenticated,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["BY_NAME", "S3", "Cinder", "GridFS", "Plain", "S3Unconditional", "Sheepdog", "Swift", "VMware"]

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TOKEN: Final = "imagestore_token"  # noqa: S105 - the name of a metadata key


class ignoring:  # noqa: N801 - used like contextlib.suppress
    """That answer of the server is as good as success."""

    def __init__(self, code: Code) -> None:
        self._code = code

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> bool:
        return isinstance(error, BackendError) and error.code == self._code


# plain: what no backend forbids


class Plain(MemoryDriver):
    """Writes at offsets, in parallel; a rename that fails if the name is taken makes the image."""

    table = "images"
    foreign = (("parts", "somebody-elses", {}), ("images", "lost+found/1", {}))

    def _capabilities(self) -> Capabilities:
        return Capabilities(
            parallel_writes=self.limits.workers,
            block_max=self.block_size,
            sparse_unit=min(4 * KIB, self.block_size or 4 * KIB),
            repeatable_create=True,
            commit_proof=True,
        )

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        return _PlainUpload(self, image_id, hints)

    def extents(self, location: Location, start: int, stop: int, version: str | None, /) -> Iterator[tuple[int, int]]:
        row = self._image(location, version, pieces=True)
        return areas(((offset, len(data)) for offset, data in sorted(row.pieces.items())), start, stop)

    def _leftovers(self) -> Iterable[Leftover]:
        return [leftover(row, row.key) for row in self.client.scan("parts") if TOKEN in row.metadata]

    def discard(self, leftover: Leftover, /) -> None:
        with ignoring("missing"):
            self.client.remove("parts", leftover.token)


class _PlainUpload(Upload):
    def __init__(self, driver: Plain, image_id: str, hints: Hints) -> None:
        self._client = driver.client
        self._image_id = image_id
        self._token = hints.token
        self.location = driver._location(image_id, image_id)
        self._client.put(
            "parts", self._token, metadata={TOKEN: self._token, "image_id": image_id, **user_metadata(hints)}
        )

    def write(self, block: Block, /) -> None:
        self._client.write("parts", self._token, block.offset, block.data)

    def commit(self, size: int, /) -> None:
        def check(pieces: dict[int, bytes]) -> dict[int, bytes]:
            check_size(end_of(pieces), size, sparse=True)
            return pieces

        self._client.move("parts", self._token, "images", self._image_id, if_absent=True, size=size, layout=check)

    def abort(self) -> None:
        with ignoring("missing"):
            self._client.remove("parts", self._token)


def end_of(pieces: dict[int, bytes]) -> int:
    """Where the last piece ends."""
    return max((offset + len(data) for offset, data in pieces.items()), default=0)


def check_size(stored: int, size: int, *, sparse: bool = False) -> None:
    """The last look before an image is made of what was stored."""
    if stored != size if not sparse else stored > size:
        raise SizeMismatch(f"{stored} bytes are stored, the image has {size}")


# s3: an object appears when its multipart upload is completed, or by one put


class S3(MemoryDriver):
    """Parts by number, checked by md5; completed on the condition that there is no such object."""

    table = "objects"
    conditional: ClassVar[bool] = True
    foreign = (("multipart", "of-a-backup-tool", {"image_id": "daily"}), ("objects", "backup/daily", {}))

    def _capabilities(self) -> Capabilities:
        return Capabilities(
            parallel_writes=self.limits.workers,
            block_min=self.block_size or 5 * MIB,
            block_max=self.block_size or 5 * GIB,
            blocks_max=10_000,
            block_digest="md5",
            collision="exclusive" if self.conditional else "detected",
            repeatable_create=True,
            commit_proof=True,
        )

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        return _S3Upload(self, image_id, hints)

    def _leftovers(self) -> Iterable[Leftover]:
        return [leftover(row, row.metadata[TOKEN]) for row in self.client.scan("multipart") if TOKEN in row.metadata]

    def discard(self, leftover: Leftover, /) -> None:
        with ignoring("missing"):
            self.client.remove("multipart", leftover.key[1])


class S3Unconditional(S3):
    """A server that knows no condition: the driver looks before it completes, and two may look at once."""

    conditional = False


class _S3Upload(Upload):
    def __init__(self, driver: S3, image_id: str, hints: Hints) -> None:
        self._driver = driver
        self._client = driver.client
        self._image_id = image_id
        self._id = fresh()
        self._metadata = {TOKEN: hints.token, "image_id": image_id, **user_metadata(hints)}
        self._parts: set[int] = set()
        self._only: Block | None = None
        self._mark_taken = False
        self.location = driver._location(image_id, image_id)
        self._client.put("multipart", self._id, metadata=self._metadata)

    def write(self, block: Block, /) -> None:
        if block.last and block.index == 0:
            self._only = block
            return
        number, limits = block.index + 1, self._driver.capabilities
        if number > (limits.blocks_max or number) or len(block.data) > (limits.block_max or len(block.data)):
            raise BackendError("invalid", f"part {number} of {len(block.data)} bytes")
        self._client.write("multipart", self._id, number, block.data, block.digest)
        self._parts.add(number)

    def commit(self, size: int, /) -> None:
        if not self._driver.conditional and self._driver.locate(self._image_id):
            raise AlreadyExists("there is an object of that name")
        if self._parts:
            self._complete(size)
        else:
            self._put(size)

    def _complete(self, size: int) -> None:
        listed = sorted(self._parts)

        def assemble(parts: dict[int, bytes]) -> dict[int, bytes]:
            if sorted(parts) != listed:
                raise BackendError("invalid", "the list leaves parts out")
            if any(len(parts[number]) < self._driver.capabilities.block_min for number in listed[:-1]):
                raise BackendError("invalid", "a part is too small")
            pieces, offset = {}, 0
            for number in listed:
                pieces[offset] = parts[number]
                offset += len(parts[number])
            check_size(offset, size)
            return pieces

        self._client.move(
            "multipart",
            self._id,
            "objects",
            self._image_id,
            if_absent=self._driver.conditional,
            size=size,
            layout=assemble,
        )

    def _put(self, size: int) -> None:
        data, digest = (self._only.data, self._only.digest) if self._only else (b"", None)
        check_size(len(data), size)
        # The mark goes first: whoever removes it decides between this commit and a discard.
        if not self._mark_taken:
            self._client.remove("multipart", self._id)
            self._mark_taken = True
        self._client.put(
            "objects",
            self._image_id,
            metadata=self._metadata,
            data=data,
            digest=digest,
            if_absent=self._driver.conditional,
        )

    def abort(self) -> None:
        self._only = None
        with ignoring("missing"):
            self._client.remove("multipart", self._id)


# swift: segments, and a manifest that names them


class Swift(MemoryDriver):
    """Segments below ``<token>/``, a marker first, and a manifest that is put if there is none of that name."""

    table = "objects"
    foreign = (
        ("segments", "backup/1700000000.0/00000001", {}),
        ("segments", "0123456789abcdef/00000001", {}),
        ("objects", "backup/daily", {}),
    )

    def _capabilities(self) -> Capabilities:
        return Capabilities(
            parallel_writes=self.limits.workers,
            block_min=self.block_size or 1,
            block_max=self.block_size or 5 * GIB,
            blocks_max=1_000,
            block_digest="md5",
            repeatable_create=True,
            commit_proof=True,
        )

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        return _SwiftUpload(self, image_id, hints)

    def delete(self, location: Location, /) -> None:
        row = self._image(location)
        self.client.remove("objects", row.key, uid=row.uid, if_free=True)
        if row.links:
            self._remove_segments(row.metadata[TOKEN])

    def _pieces(self, row: Row) -> Iterable[Piece]:
        offset = 0
        for _, key, length, etag in row.links:
            yield offset, length, partial(self._segment, key, etag)
            offset += length
        yield from super()._pieces(row)

    def _segment(self, key: str, etag: str) -> bytes:
        with ignoring("missing"):
            segment = self.client.get("segments", key, pieces=True)
            if segment.etag == etag:
                return self.client.load(segment.pieces.get(0, b""))
        raise BackendError("unavailable", "the connection was cut: a segment is gone")

    def _leftovers(self) -> Iterable[Leftover]:
        uploads: defaultdict[str, list[Row]] = defaultdict(list)
        for row in self.client.scan("segments"):
            token, _, _ = row.key.partition("/")
            if re.fullmatch("[0-9a-f]{32}", token):
                uploads[token].append(row)
        for token, rows in uploads.items():
            marker = next((row for row in rows if row.key.endswith("/marker")), rows[0])
            if self._manifest(token, marker.metadata.get("image_id")) is None:
                yield leftover(marker, token, held=sum(row.stored for row in rows))

    def discard(self, leftover: Leftover, /) -> None:
        """Whoever claims first decides between a discard and a commit: segments must not vanish under a manifest."""
        token = leftover.token
        try:
            self._claim(token, "discard")
        except NotFound:
            if any(claim.alive for claim in self.client.scan("segments", prefix=f"{token}/claim")):
                return
        self._remove_upload(token, leftover.image_id)

    def _claim(self, token: str, purpose: str) -> None:
        try:
            self.client.put("segments", f"{token}/claim", metadata={"for": purpose}, if_absent=True)
        except BackendError as error:
            if error.code != "exists":
                raise
            with ignoring("missing"):
                if self.client.get("segments", f"{token}/claim").metadata["for"] == purpose:
                    return
            raise NotFound(f"too late for a {purpose}") from error

    def _manifest(self, token: str, image_id: str | None) -> Row | None:
        """The manifest that holds the segments of ``token``."""
        with ignoring("missing"):
            row = self.client.get("objects", image_id or "")
            if row.links and row.metadata.get(TOKEN) == token:
                return row
        return None

    def _remove_upload(self, token: str, image_id: str | None) -> None:
        if self._manifest(token, image_id) is None:
            self._remove_segments(token)
        else:
            with ignoring("missing"):
                self.client.remove("segments", f"{token}/claim")

    def _remove_segments(self, token: str) -> None:
        """Segments first (their names sort so), then marker and claim."""
        rows = self.client.scan("segments", prefix=f"{token}/")
        for row in sorted(rows, key=lambda row: (row.key.endswith("/claim"), row.key.endswith("/marker"), row.key)):
            with ignoring("missing"):
                self.client.remove("segments", row.key)


class _SwiftUpload(Upload):
    def __init__(self, driver: Swift, image_id: str, hints: Hints) -> None:
        self._driver = driver
        self._client = driver.client
        self._image_id = image_id
        self._token = hints.token
        self._metadata = {TOKEN: hints.token, "image_id": image_id, **user_metadata(hints)}
        self._segments: dict[int, tuple[str, str, int, str]] = {}
        self._only: Block | None = None
        self.location = driver._location(image_id, image_id)
        self._client.put("segments", f"{self._token}/marker", metadata={"image_id": image_id})

    def write(self, block: Block, /) -> None:
        if block.last and block.index == 0:
            self._only = block
            return
        key = f"{self._token}/{block.index:08}"
        row = self._client.put("segments", key, data=block.data, digest=block.digest)
        self._segments[block.index] = ("segments", key, row.size, row.etag)

    def commit(self, size: int, /) -> None:
        self._driver._claim(self._token, "commit")
        self._client.get("segments", f"{self._token}/marker")
        segments = tuple(self._segments[index] for index in sorted(self._segments))
        if len(segments) > (self._driver.capabilities.blocks_max or 0):
            raise BackendError("invalid", "too many segments")
        data, digest = (self._only.data, self._only.digest) if self._only else (b"", None)
        check_size(sum(length for _, _, length, _ in segments) + len(data), size)
        self._client.put(
            "objects",
            self._image_id,
            metadata=self._metadata,
            data=data,
            digest=digest,
            size=size,
            links=segments,
            if_absent=True,
        )
        self._driver._remove_upload(self._token, self._image_id)

    def abort(self) -> None:
        self._only = None
        self._driver._remove_upload(self._token, self._image_id)


# cinder: a volume, there from the beginning under an id of the server's


class Cinder(MemoryDriver):
    """A volume that metadata makes an image. Ids are looked up, so two adders may both succeed."""

    table = "volumes"
    create_delay: ClassVar[float] = 0.01
    """Seconds until a new volume is available."""
    foreign = (
        ("volumes", "5b0f7d3c-0000-4000-8000-000000000001", {"name": "database"}),
        ("volumes", "5b0f7d3c-0000-4000-8000-000000000002", {"image_id": "of-an-instance"}),
    )

    bound = False

    def open(self) -> None:
        super().open()
        self.client.refused = self.capabilities.needs_auth
        self.unit = 4 * self.block_size if self.block_size else GIB

    def close(self) -> None:
        if not self.bound:
            super().close()

    def _capabilities(self) -> Capabilities:
        return Capabilities(
            parallel_writes=1,
            block_max=self.block_size,
            collision="detected",
            commit_proof=True,
            needs_auth=bool(getattr(self.settings, "require_auth", False)),
        )

    def bind(self, auth: Any, /) -> Cinder:
        """A driver for one project: it shares the session, sees that project's volumes, and isn't to be opened."""
        find = getattr(auth, "get_project_id", None)
        project = find() if callable(find) else getattr(auth, "project_id", None)
        if not project:
            raise Unauthenticated("the auth is for no project")
        bound = Cinder(
            self.settings, store=self.store, limits=self.limits, timeouts=self.timeouts, backend=self.backend
        )
        bound.bound = True
        bound.client = self.client.acting_for(project)
        bound.capabilities = self.capabilities
        bound.unit = self.unit
        return bound

    def _location_of_key(self, key: str) -> Location:
        if not re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", key):
            raise InvalidLocation("not a location: its last part is no volume id")
        return self._location(key, None)

    def _is_image(self, row: Row) -> bool:
        return {"image_id", "image_size"} <= row.metadata.keys() and "imagestore_upload" not in row.metadata

    def _image(self, location: Location, version: str | None = None, *, pieces: bool = False) -> Row:
        row = super()._image(location, version, pieces=pieces)
        row.size = int(row.metadata["image_size"])
        return row

    def locate(self, image_id: str, /) -> Location | None:
        rows = [row for row in self.client.scan("volumes", where={"image_id": image_id}) if self._is_image(row)]
        return self._location(rows[0].key, None) if rows else None

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        return _CinderUpload(self, image_id, hints)

    def _entry(self, row: Row) -> StoredImage:
        size = int(row.metadata["image_size"])
        return StoredImage(image_id=row.metadata["image_id"], location=self._location(row.key, None), size=size)

    def _leftovers(self) -> Iterable[Leftover]:
        for row in self.client.scan("volumes"):
            if "imagestore_upload" in row.metadata:
                yield leftover(row, row.metadata["imagestore_upload"])

    def discard(self, leftover: Leftover, /) -> None:
        self._remove_upload(leftover.key[1], leftover.token)

    def _remove_upload(self, volume: str, token: str) -> None:
        # In two steps, so that a commit that comes between them is refused.
        with ignoring("missing"):
            mine = {"imagestore_upload": token}
            self.client.update("volumes", volume, expect=mine, metadata={"imagestore_discard": "True"})
            self.client.remove("volumes", volume)


class _CinderUpload(Upload):
    def __init__(self, driver: Cinder, image_id: str, hints: Hints) -> None:
        self._driver = driver
        self._client = driver.client
        self._image_id = image_id
        self._token = hints.token
        self._volume = fresh()
        self._size = self._rounded(hints.size or 1)
        self.location = driver._location(self._volume, None)
        self._refuse_taken()
        self._client.put(
            "volumes",
            self._volume,
            metadata={"imagestore_upload": self._token, "image_id": image_id, **user_metadata(hints)},
            size=self._size,
        )
        time.sleep(driver.create_delay)

    def write(self, block: Block, /) -> None:
        end = block.offset + len(block.data)
        if end > self._size:
            # Each extension detaches and attaches the volume, so there should be few.
            self._size = self._rounded(max(end, 2 * self._size))
            self._client.update("volumes", self._volume, size=self._size)
        self._client.write("volumes", self._volume, block.offset, block.data)

    def commit(self, size: int, /) -> None:
        self._refuse_taken()
        check_size(self._client.get("volumes", self._volume).stored, size)
        self._client.update(
            "volumes",
            self._volume,
            expect={"imagestore_upload": self._token, "imagestore_discard": None},
            metadata={
                "imagestore_upload": None,
                TOKEN: self._token,
                "image_size": str(size),
                "readonly": "True",
            },
        )

    def abort(self) -> None:
        self._driver._remove_upload(self._volume, self._token)

    def _rounded(self, size: int) -> int:
        return -(-size // self._driver.unit) * self._driver.unit

    def _refuse_taken(self) -> None:
        taken = self._driver.locate(self._image_id)
        if taken is not None and taken != self.location:
            raise AlreadyExists("another volume holds an image of that id", location=taken.uri)


# sheepdog: no rename, so the name is taken from the beginning


class Sheepdog(MemoryDriver):
    """A VDI of its final name, and no image as long as our tag is on it: nobody else can have the name then."""

    table = "vdis"
    uploading: ClassVar[str] = "imagestore-upload:"
    deleting: ClassVar[str] = "imagestore-delete:"
    foreign = (("vdis", "disk of vm 1", {}), ("vdis", "disk of vm 2", {"tag": "imagestore"}))

    def open(self) -> None:
        self.object_size = self.block_size or 4 * MIB
        super().open()

    def _capabilities(self) -> Capabilities:
        return Capabilities(
            parallel_writes=self.limits.workers,
            block_min=self.object_size,
            block_max=self.object_size,
            blocks_max=1 << 20,
            sparse_unit=self.object_size,
        )

    def _is_image(self, row: Row) -> bool:
        return super()._is_image(row) and not row.metadata.get("tag", "").startswith((self.uploading, self.deleting))

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        return _SheepdogUpload(self, image_id, hints)

    def extents(self, location: Location, start: int, stop: int, version: str | None, /) -> Iterator[tuple[int, int]]:
        row = self._image(location, version, pieces=True)
        return areas(((offset, len(data)) for offset, data in sorted(row.pieces.items())), start, stop)

    def delete(self, location: Location, /) -> None:
        """The image keeps no token, so the mark of a delete holds a fresh one."""
        row = self._image(location)
        tag = self.deleting + uuid.uuid4().hex
        self.client.update(
            "vdis", row.key, uid=row.uid, expect={"tag": row.metadata.get("tag")}, metadata={"tag": tag}, if_free=True
        )
        with ignoring("missing"):
            self.client.remove("vdis", row.key, uid=row.uid)

    def _leftovers(self) -> Iterable[Leftover]:
        for row in self.client.scan("vdis"):
            tag = row.metadata.get("tag", "")
            if tag.startswith((self.uploading, self.deleting)):
                yield leftover(row, tag.partition(":")[2], image_id=row.key)

    def discard(self, leftover: Leftover, /) -> None:
        self._remove_upload(leftover.key[1], leftover.token)

    def _remove_upload(self, name: str, token: str) -> None:
        with ignoring("missing"):
            row = self.client.get("vdis", name)
            if row.metadata.get("tag") not in (self.uploading + token, self.deleting + token):
                return
            # Tagged anew in one step, so that a commit that comes now finds its own tag gone.
            gone = {"tag": self.deleting + token}
            self.client.update("vdis", name, uid=row.uid, expect={"tag": row.metadata["tag"]}, metadata=gone)
            self.client.remove("vdis", name, uid=row.uid)

    def _why_taken(self, name: str) -> str:
        with ignoring("missing"):
            row = self.client.get("vdis", name)
            if not self._is_image(row):
                return (
                    "the id is held by an unfinished upload or delete: wait for its end, or collect what it left"
                    f" (token {row.metadata.get('tag', '').partition(':')[2]})"
                )
        return "there is a VDI of that name"


class _SheepdogUpload(Upload):
    def __init__(self, driver: Sheepdog, image_id: str, hints: Hints) -> None:
        self._driver = driver
        self._client = driver.client
        self._name = image_id
        self._token = hints.token
        self._tag = driver.uploading + hints.token
        self.location = driver._location(image_id, image_id)
        largest = driver.object_size << 20
        try:
            row = self._client.put("vdis", image_id, metadata={"tag": self._tag}, size=largest, if_absent=True)
        except BackendError as error:
            if error.code != "exists":
                raise
            raise AlreadyExists(driver._why_taken(image_id)) from error
        self._vid = row.uid

    def write(self, block: Block, /) -> None:
        if block.offset % self._driver.object_size or len(block.data) > self._driver.object_size:
            raise BackendError("invalid", "not one object")
        self._client.write("vdis", self._name, block.offset, block.data, uid=self._vid)

    def commit(self, size: int, /) -> None:
        row = self._client.get("vdis", self._name, pieces=True)
        # Only this upload can have made an image of this VDI, so an earlier attempt in doubt is no riddle.
        if row.uid == self._vid and "tag" not in row.metadata and row.size == size:
            return
        check_size(end_of(row.pieces), size, sparse=True)
        self._client.update(
            "vdis", self._name, uid=self._vid, expect={"tag": self._tag}, metadata={"tag": None}, size=size
        )

    def abort(self) -> None:
        self._driver._remove_upload(self._name, self._token)


# gridfs: chunk documents, and a files document that makes them an image


class GridFS(MemoryDriver):
    """Chunks by number under a fresh files id; the files document has a unique index on the image id."""

    table = "files"
    foreign = (
        ("uploads", "of-another-tool", {}),
        ("chunks", "64b0f1/0", {}),
        ("files", "64b0f2", {"filename": "report.pdf"}),
    )

    def _capabilities(self) -> Capabilities:
        return Capabilities(
            parallel_writes=self.limits.workers,
            block_min=self.block_size or 1,
            block_max=self.block_size or 15 * MIB,
            repeatable_create=True,
            commit_proof=True,
        )

    def _is_image(self, row: Row) -> bool:
        return "image_id" in row.metadata

    def _find(self, image_id: str) -> Row | None:
        return next(iter(self.client.scan("files", where={"image_id": image_id})), None)

    def _image(self, location: Location, version: str | None = None, *, pieces: bool = False) -> Row:
        row = self._find(location.key[0])
        if row is None:
            raise NotFound("there is no files document of that image id")
        return super()._image(Location(uri=location.uri, key=(row.key,)), version)

    def locate(self, image_id: str, /) -> Location | None:
        return self._location(image_id, image_id) if self._find(image_id) else None

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        return _GridFSUpload(self, image_id, hints)

    def _pieces(self, row: Row) -> Iterable[Piece]:
        step = int(row.metadata["chunk_size"])
        for number, offset in enumerate(range(0, row.size, step)):
            key = f"{row.key}/{number}"
            yield offset, min(step, row.size - offset), partial(self._chunk, key)

    def _chunk(self, key: str) -> bytes:
        with ignoring("missing"):
            return self.client.load(self.client.get("chunks", key, pieces=True).pieces.get(0, b""))
        raise BackendError("unavailable", "a chunk is missing")

    def _entry(self, row: Row) -> StoredImage:
        image_id = row.metadata["image_id"]
        return StoredImage(image_id=image_id, location=self._location(image_id, image_id), size=row.size)

    def delete(self, location: Location, /) -> None:
        """Without the document in ``uploads`` nobody would find the chunks of a delete that was cut."""
        row = self._image(location)
        token = row.metadata.get(TOKEN) or uuid.uuid4().hex
        self.client.put("uploads", token, metadata={TOKEN: token, "files_id": row.key})
        try:
            self.client.remove("files", row.key, uid=row.uid, if_free=True)
        except BackendError as error:
            if error.code == "busy":
                self.client.remove("uploads", token)
            raise
        self._remove_upload(token, row.key)

    def _leftovers(self) -> Iterable[Leftover]:
        for row in self.client.scan("uploads"):
            if TOKEN in row.metadata:
                chunks = self.client.scan("chunks", prefix=row.metadata["files_id"] + "/")
                yield leftover(row, row.key, held=sum(chunk.stored for chunk in chunks))

    def discard(self, leftover: Leftover, /) -> None:
        with ignoring("missing"):
            row = self.client.get("uploads", leftover.token)
            committing = row.metadata.get("committing")
            if committing and row.alive:
                return
            self.client.update("uploads", row.key, expect={"committing": committing}, metadata={"discarding": "1"})
            self._remove_upload(row.key, row.metadata["files_id"])

    def _remove_upload(self, token: str, files_id: str) -> None:
        """The document goes last. Chunks that a files document names are an image's, only the document is left over."""
        try:
            self.client.get("files", files_id)
        except BackendError as error:
            if error.code != "missing":
                raise
            self.client.remove_all("chunks", files_id + "/")
        with ignoring("missing"):
            self.client.remove("uploads", token)


class _GridFSUpload(Upload):
    def __init__(self, driver: GridFS, image_id: str, hints: Hints) -> None:
        self._driver = driver
        self._client = driver.client
        self._image_id = image_id
        self._token = hints.token
        self._files_id = fresh()
        self._chunk_size = hints.block_size
        self._metadata = {TOKEN: hints.token, "image_id": image_id, **user_metadata(hints)}
        self._lock = threading.Lock()
        self._stored: dict[int, int] = {}
        self.location = driver._location(image_id, image_id)
        self._client.put(
            "uploads", self._token, metadata={TOKEN: self._token, "image_id": image_id, "files_id": self._files_id}
        )

    def write(self, block: Block, /) -> None:
        if block.offset != block.index * self._chunk_size or (len(block.data) != self._chunk_size and not block.last):
            raise BackendError("invalid", "chunks must be equally long")
        # The beat; it fails if the upload was discarded, so that no chunk comes after that.
        self._client.update("uploads", self._token, expect={"discarding": None}, metadata={"beat": str(block.index)})
        self._client.put("chunks", f"{self._files_id}/{block.index}", data=block.data)
        with self._lock:
            self._stored[block.index] = len(block.data)

    def commit(self, size: int, /) -> None:
        check_size(sum(self._stored.values()), size)
        self._client.update("uploads", self._token, expect={"discarding": None}, metadata={"committing": "1"})
        try:
            self._client.put(
                "files",
                self._files_id,
                metadata={**self._metadata, "chunk_size": str(self._chunk_size)},
                size=size,
                if_absent=True,
                unique="image_id",
            )
        except BackendError as error:
            if error.code != "exists":
                raise
            self._client.update("uploads", self._token, metadata={"committing": None})
            found = self._driver._find(self._image_id)
            if found is None or found.key != self._files_id:
                raise
        with ignoring("missing"):
            self._client.remove("uploads", self._token)

    def abort(self) -> None:
        self._driver._remove_upload(self._token, self._files_id)


# vmware: one stream to a temporary file, which is moved


class VMware(MemoryDriver):
    """A file is put under a temporary name as one stream, and moved if there is none of the final name."""

    table = "datastore"
    foreign = (("datastore", ".vSphere-HA/protectedlist", {}), ("datastore", ".imagestore-notes.part", {}))

    def _capabilities(self) -> Capabilities:
        return Capabilities(
            parallel_writes=1, block_max=self.block_size, repeatable_writes=False, repeatable_create=True
        )

    def check_id(self, image_id: str, /) -> None:
        if image_id.lower().endswith(".vmdk"):
            raise InvalidImageId("names that end in .vmdk belong to the virtual disk manager")

    def _is_image(self, row: Row) -> bool:
        return super()._is_image(row) and not row.key.lower().endswith(".vmdk")

    def create(self, image_id: str, hints: Hints, /) -> Upload:
        return _VMwareUpload(self, image_id, hints)

    def _leftovers(self) -> Iterable[Leftover]:
        uploads: defaultdict[str, list[Row]] = defaultdict(list)
        for row in self.client.scan("datastore", prefix=".imagestore-"):
            if found := re.fullmatch(r"\.imagestore-([0-9a-f]{32})\.(mark|part)", row.key):
                uploads[found[1]].append(row)
        for token, rows in uploads.items():
            last = max(rows, key=lambda row: row.touched)
            yield leftover(last, token, image_id=self._marked(token), held=sum(row.stored for row in rows))

    def _marked(self, token: str) -> str | None:
        with ignoring("missing"):
            mark = self.client.get("datastore", f".imagestore-{token}.mark", pieces=True).pieces.get(0, b"").decode()
            return mark if IMAGE_ID.fullmatch(mark) else None
        return None

    def discard(self, leftover: Leftover, /) -> None:
        self._remove_upload(leftover.token)

    def _remove_upload(self, token: str) -> None:
        """The mark goes first: an upload whose mark is there and whose part is not was moved, not discarded."""
        for kind in ("mark", "part"):
            with ignoring("missing"):
                self.client.remove("datastore", f".imagestore-{token}.{kind}")


class _VMwareUpload(PullUpload):
    def __init__(self, driver: VMware, image_id: str, hints: Hints) -> None:
        super().__init__()
        self._driver = driver
        self._client = driver.client
        self._name = image_id
        self._token = hints.token
        self._mark = f".imagestore-{hints.token}.mark"
        self._part = f".imagestore-{hints.token}.part"
        self._moved = False
        self.location = driver._location(image_id, image_id)
        self._client.put("datastore", self._mark, data=image_id.encode())

    def put(self, reader: PullReader, /) -> None:
        self._client.put("datastore", self._part)
        offset = 0
        while data := reader.read():
            self._client.write("datastore", self._part, offset, data)
            offset += len(data)

    def commit(self, size: int, /) -> None:
        self.finish()
        if not self._moved:
            self._move(size)
            self._moved = True
        with ignoring("missing"):
            self._client.remove("datastore", self._mark)

    def _move(self, size: int) -> None:
        self._client.get("datastore", self._mark)
        try:
            stored = self._client.get("datastore", self._part).stored
        except BackendError as error:
            if error.code != "missing":
                raise
            # Who discards removes the mark first: a part that is gone while the mark stands was moved, by us.
            self._client.get("datastore", self._mark)
            return
        check_size(stored, size)
        self._client.move("datastore", self._part, "datastore", self._name, if_absent=True, size=size)

    def abort(self) -> None:
        self.stop()
        self._driver._remove_upload(self._token)


BY_NAME: Final[dict[str, type[MemoryDriver]]] = {
    "plain": Plain,
    "s3": S3,
    "s3-unconditional": S3Unconditional,
    "swift": Swift,
    "cinder": Cinder,
    "sheepdog": Sheepdog,
    "gridfs": GridFS,
    "vmware": VMware,
}
