"""What imagestore does, shown on this machine: no server, no configuration, and nothing is left afterwards."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from imagestore._models import KIB, MIB, AddResult
from imagestore._store import Store
from imagestore.errors import AlreadyExists, DigestMismatch, InvalidLocation, SourceError, StoreError

__all__ = ["SIZE", "SIZE_MIN", "Disk", "Step", "human", "make_disk", "run"]

SIZE: Final = 256 * MIB
SIZE_MIN: Final = 32 * MIB
SECTOR: Final = 512
PAGE: Final = 4096
IMAGE_ID: Final = "demo-disk"

_ZEROS: Final = bytes(MIB)
_ESP: Final = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
_LINUX: Final = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
_ENTRIES: Final = 128
_ENTRY: Final = 128

E = TypeVar("E", bound=StoreError)


def human(size: float) -> str:
    """``size`` bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A sparse disk: `pieces` are (offset, data), ascending; all else is zeros."""

    size: int
    pieces: tuple[tuple[int, bytes], ...]

    @property
    def data(self) -> int:
        """Bytes that are not in holes."""
        return sum(len(data) for _, data in self.pieces)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` up to but not including ``stop``."""
        found = bytearray(stop - start)
        for offset, data in self.pieces:
            low, high = max(start, offset), min(stop, offset + len(data))
            if low < high:
                found[low - start : high - start] = data[low - offset : high - offset]
        return bytes(found)

    def chunks(self) -> Iterator[bytes]:
        """All bytes in order, 1 MiB at a time, as a pipe would bring them."""
        pieces = list(reversed(self.pieces))
        for start in range(0, self.size, MIB):
            stop = min(start + MIB, self.size)
            while pieces and pieces[-1][0] + len(pieces[-1][1]) <= start:
                pieces.pop()
            if pieces and pieces[-1][0] < stop:
                yield self.read(start, stop)
            else:
                yield _ZEROS[: stop - start]


def make_disk(size: int = SIZE, seed: int = 1) -> Disk:
    """A disk of ``size`` bytes with a partition table, a boot partition and files in a few per cent of it.

    The same ``size`` and ``seed`` always make the same disk. The table is a GPT with its backup and a protective
    MBR (UEFI specification 2.10, chapter 5).
    """
    chance = random.Random(seed)  # noqa: S311 - a disk for a show needs no secrets, and must be the same each time
    size -= size % MIB
    boot, root, end = MIB, 17 * MIB, size - MIB
    table = _partition_table(size, chance, ((_ESP, boot, root, "boot"), (_LINUX, root, end, "root")))
    pieces = [*table, (boot, chance.randbytes(96 * KIB))]
    # One file in each stretch of 8 MiB keeps them apart.
    for start in range(root, end - 8 * MIB + 1, 8 * MIB):
        length = PAGE * chance.randint(4, 160)
        offset = start + PAGE * chance.randrange((8 * MIB - length) // PAGE)
        pieces.append((offset, _log(length, chance) if chance.random() < 0.3 else chance.randbytes(length)))
    return Disk(size=size, pieces=tuple(sorted(pieces)))


def _log(length: int, chance: random.Random) -> bytes:
    lines = b"".join(
        f"[{time_:>12.6f}] virtio_blk virtio{time_ % 8:.0f}: request {chance.getrandbits(64):016x} done\n".encode()
        for time_ in (chance.random() * 10**5 for _ in range(200))
    )
    return (lines * (length // len(lines) + 1))[:length]


def _partition_table(
    size: int, chance: random.Random, partitions: tuple[tuple[uuid.UUID, int, int, str], ...]
) -> list[tuple[int, bytes]]:
    last = size // SECTOR - 1
    array_sectors = _ENTRIES * _ENTRY // SECTOR
    disk_id = _guid(chance)
    entries = b"".join(
        struct.pack(
            "<16s16sQQQ72s",
            kind.bytes_le,
            _guid(chance).bytes_le,
            start // SECTOR,
            stop // SECTOR - 1,
            0,
            name.encode("utf-16-le"),
        )
        for kind, start, stop, name in partitions
    ).ljust(_ENTRIES * _ENTRY, b"\0")

    def header(mine: int, other: int, array: int) -> bytes:
        def pack(checksum: int) -> bytes:
            usable = (2 + array_sectors, last - array_sectors - 1)
            return struct.pack(
                "<8sIIIIQQQQ16sQIII",
                b"EFI PART",
                0x10000,
                92,
                checksum,
                0,
                mine,
                other,
                *usable,
                disk_id.bytes_le,
                array,
                _ENTRIES,
                _ENTRY,
                zlib.crc32(entries),
            )

        return pack(zlib.crc32(pack(0))).ljust(SECTOR, b"\0")

    protective = struct.pack("<B3sB3sII", 0, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF))
    mbr = chance.randbytes(440) + bytes(6) + protective + bytes(48) + b"\x55\xaa"
    front = mbr + header(1, last, 2) + entries
    back = entries + header(last, 1, last - array_sectors)
    return [(0, front), (size - len(back), back)]


def _guid(chance: random.Random) -> uuid.UUID:
    return uuid.UUID(int=chance.getrandbits(128), version=4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of the demonstration.

    Attributes:
        name: what was to be shown.
        detail: what happened, for people.
        ok: it is as it should be.
        seconds: how long it took.
        values: the figures behind `detail`.
    """

    name: str
    detail: str
    ok: bool
    seconds: float
    values: Mapping[str, object] = field(default_factory=dict)


class _Wrong(Exception):
    """Something is not as it should be."""


def run(directory: Path, *, size: int = SIZE, seed: int = 1) -> Iterator[Step]:
    """Show everything in ``directory``, which is empty; each step is told as it ends.

    A step that fails tells why. If it failed unexpectedly, the rest would mean nothing, and it is the last.
    """
    from imagestore.config import open_store

    with open_store("file", "demo", datadir=str(directory)) as store:
        demo = _Demo(store, directory, size, seed)
        for name, action in demo.steps():
            began = time.perf_counter()
            stop = False
            try:
                detail, values = action()
                ok = True
            except _Wrong as wrong:
                ok, detail, values = False, str(wrong), {}
            except Exception as error:  # noqa: BLE001 - whatever it is, the step failed, and the table says so
                ok, detail, values, stop = False, f"{type(error).__name__}: {error}", {}, True
            yield Step(name=name, detail=detail, ok=ok, seconds=time.perf_counter() - began, values=values)
            if stop:
                return


_Shown = tuple[str, dict[str, object]]


class _Demo:
    def __init__(self, store: Store, directory: Path, size: int, seed: int) -> None:
        self.store = store
        self.directory = directory
        self.size = size
        self.seed = seed
        self.disk: Disk
        self.digest: str
        self.image: AddResult

    def steps(self) -> tuple[tuple[str, Callable[[], _Shown]], ...]:
        return (
            ("Make a disk", self.make),
            ("Store it", self.add),
            ("Its digest", self.digests),
            ("List", self.listed),
            ("Verify", self.verify),
            ("Read a range", self.read),
            ("Same id again", self.duplicate),
            ("Wrong digest", self.mismatch),
            ("Upload cut off", self.cut),
            ("Foreign location", self.outside),
            ("Delete", self.delete),
        )

    def make(self) -> _Shown:
        self.disk = make_disk(self.size, self.seed)
        digest = hashlib.sha256()
        for chunk in self.disk.chunks():
            digest.update(chunk)
        self.digest = digest.hexdigest()
        detail = f"{human(self.disk.size)}: GPT, 2 partitions, {human(self.disk.data)} of data"
        return detail, {"size": self.disk.size, "data": self.disk.data, "sha256": self.digest, "seed": self.seed}

    def add(self) -> _Shown:
        began = time.perf_counter()
        self.image = self.store.add(IMAGE_ID, self.disk.chunks(), metadata={"made-by": "imagestore demo"})
        seconds = time.perf_counter() - began
        _same("size", self.image.size, self.disk.size)
        if self.image.stored > self.disk.size // 4:
            raise _Wrong(f"{human(self.image.stored)} were written: the zeros were not left out")
        allocated = os.stat(self.directory / IMAGE_ID).st_blocks * 512
        rate = self.image.size / seconds
        detail = (
            f"as a stream of unknown size, {human(rate)}/s\n"
            f"{human(self.image.stored)} written, {human(allocated)} on disk: holes kept"
        )
        return detail, {
            "location": self.image.location.uri,
            "size": self.image.size,
            "stored": self.image.stored,
            "allocated": allocated,
            "bytes_per_second": round(rate),
        }

    def digests(self) -> _Shown:
        found = self.image.digests["sha256"]
        _same("sha256", found, self.digest)
        return f"sha256 {found[:16]}… as that of the disk", {"digests": dict(self.image.digests)}

    def listed(self) -> _Shown:
        images = [(image.image_id, image.size) for image in self.store.list()]
        _same("list", images, [(IMAGE_ID, self.disk.size)])
        return f"{IMAGE_ID}, {human(self.disk.size)}", {"images": [name for name, _ in images]}

    def verify(self) -> _Shown:
        result = self.store.verify(self.image.location, expected={"sha256": self.digest})
        _same("size", result.size, self.disk.size)
        return f"{human(result.size)} read back, sha256 agrees", {"digests": dict(result.digests)}

    def read(self) -> _Shown:
        offset, data = self.disk.pieces[len(self.disk.pieces) // 2]
        ranges = ((SECTOR, 2 * SECTOR), (offset - PAGE, offset + len(data) + PAGE))
        for start, stop in ranges:
            with self.store.get(self.image.location, start=start, stop=stop) as reader:
                if reader.read() != self.disk.read(start, stop):
                    raise _Wrong(f"bytes {start} to {stop} differ from those of the disk")
        start, stop = ranges[-1]
        return f"GPT header; {human(stop - start)} at {start:,}: equal", {"ranges": ranges}

    def duplicate(self) -> _Shown:
        before = self.store.stat(self.image.location)
        error = _refused(AlreadyExists, lambda: self.store.add(IMAGE_ID, b"another image"))
        _same("stored image", self.store.stat(self.image.location), before)
        return f"refused: {error.message}; image untouched", {"error": type(error).__name__}

    def mismatch(self) -> _Shown:
        before = self._contents()
        error = _refused(
            DigestMismatch, lambda: self.store.add("other", self.disk.chunks(), expected={"sha256": "0" * 64})
        )
        self._nothing_left("other", before)
        return "refused at its end; nothing is left", {"error": type(error).__name__}

    def cut(self) -> _Shown:
        before = self._contents()
        sent = self.disk.size // 2

        def source() -> Iterator[bytes]:
            for number, chunk in enumerate(self.disk.chunks()):
                if number * MIB >= sent:
                    break
                yield chunk
            if self.store.exists("other"):
                raise _Wrong("a part of an image can be seen")
            raise ConnectionResetError("the sender is gone")

        error = _refused(SourceError, lambda: self.store.add("other", source()))
        if isinstance(error.__cause__, _Wrong):
            raise error.__cause__
        self._nothing_left("other", before)
        return f"cut after {human(sent)}: never seen, nothing left", {
            "error": type(error).__name__,
            "cut_at": sent,
        }

    def outside(self) -> _Shown:
        uri = f"{self.image.location.uri.rpartition('/')[0]}/../../../etc/passwd"
        error = _refused(InvalidLocation, lambda: self.store.get(uri))
        return "…/../../../etc/passwd is refused", {"error": type(error).__name__}

    def delete(self) -> _Shown:
        self.store.delete(self.image.location)
        self._nothing_left(IMAGE_ID, [])
        return "gone; the directory is empty again", {"left": []}

    def _contents(self) -> list[tuple[str, int]]:
        with os.scandir(self.directory) as entries:
            return sorted((entry.name, entry.stat(follow_symlinks=False).st_blocks) for entry in entries)

    def _nothing_left(self, image_id: str, before: list[tuple[str, int]]) -> None:
        if self.store.exists(image_id):
            raise _Wrong(f"there is an image {image_id}")
        _same("leftovers", list(self.store.uploads()), [])
        _same("files", self._contents(), before)


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise _Wrong(f"{what}: {found}, expected {wanted}")


def _refused(kind: type[E], call: Callable[[], object]) -> E:
    try:
        call()
    except kind as error:
        return error
    raise _Wrong("it was not refused")
