"""The sample images: each with what it is declared as, and whether it must be accepted."""

from __future__ import annotations

import csv
import functools
import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from imagestore.formats import Inspection, Inspector, Policy

ARCHIVE = Path(__file__).parent / "data" / "samples.tar.xz"


@dataclass(frozen=True)
class Sample:
    name: str
    disk: str
    container: str
    verdict: str
    why: str
    virtual_size: int | None
    size: int
    packed: bytes  # 300 MiB of mostly zeros are too much to hold

    @property
    def data(self) -> bytes:
        return _unpacked(self.packed)

    def __str__(self) -> str:
        return self.name


@functools.lru_cache(maxsize=6)
def _unpacked(packed: bytes) -> bytes:
    return zlib.decompress(packed)


@functools.cache
def samples() -> tuple[Sample, ...]:
    with tarfile.open(ARCHIVE) as archive:
        contents = {member.name: archive.extractfile(member).read for member in archive}  # type: ignore[union-attr]
        table = contents.pop("MANIFEST.tsv")().decode()
        members = {name: zlib.compress(read(), 1) for name, read in contents.items()}
        sizes = {member.name: member.size for member in archive}
    rows = csv.DictReader(io.StringIO(table), delimiter="\t")
    return tuple(
        Sample(
            name=row["file"],
            disk=row["declared_disk"],
            container=row["declared_container"],
            verdict=row["verdict"],
            why=row["why_or_attack"],
            virtual_size=int(row["virtual_size_qemu"]) if row["virtual_size_qemu"] else None,
            size=sizes[row["file"]],
            packed=members[row["file"]],
        )
        for row in rows
    )


@functools.cache
def sample(name: str) -> Sample:
    return next(each for each in samples() if each.name == name)


def run(
    data: bytes, disk: str | None, container: str | None, size: int | None = None, policy: Policy | None = None
) -> tuple[Inspection, str]:
    """The inspection and the refusal, for a stream cut into chunks of `size` bytes."""
    inspector = Inspector(disk_format=disk, container_format=container, policy=policy)
    step = size or len(data) or 1
    for start in range(0, len(data), step):
        inspector.feed(data[start : start + step])
    return inspector.finish(), str(inspector.refusal)


def fatal(inspection: Inspection) -> set[str]:
    return {each.code for each in inspection.findings if Policy().refuses(each)}
