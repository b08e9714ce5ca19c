"""MBR (as every PC BIOS reads it), GPT (UEFI specification, chapter 5) and boot sectors of file systems."""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from typing import Final

from imagestore.formats._findings import Report
from imagestore.formats._window import View

__all__ = ["is_fat", "is_mbr", "parse_ext", "parse_gpt", "parse_mbr"]

_PROTECTIVE: Final = 0xEE
_TABLE_MAX: Final = 1 << 20


def is_fat(head: bytes) -> bool:
    """Whether the first sector is the boot sector of a FAT volume."""
    if len(head) < 512 or head[510:512] != b"\x55\xaa":
        return False
    sector, cluster, _, fats = struct.unpack_from("<HBHB", head, 11)
    power = cluster != 0 and cluster & (cluster - 1) == 0
    return sector in {512, 1024, 2048, 4096} and power and fats in {1, 2} and (head[21] == 0xF0 or head[21] >= 0xF8)


def _entries(head: bytes) -> list[tuple[int, int, int, int]]:
    """Flag, type, first sector and count of the four entries."""
    fields = (struct.unpack_from("<B3xB3xII", head, 446 + 16 * index) for index in range(4))
    return [(flag, kind, start, count) for flag, kind, start, count in fields]


def is_mbr(head: bytes) -> bool:
    """Whether the first sector is a partition table. The two signature bytes alone mean almost nothing."""
    if len(head) < 512 or head[510:512] != b"\x55\xaa":
        return False
    entries = _entries(head)
    return all(flag in {0, 0x80} for flag, *_ in entries) and any(kind and count for _, kind, _, count in entries)


def parse_mbr(view: View, report: Report) -> None:
    """Partitions within the disk; a hybrid table beside a GPT is told."""
    entries = [entry for entry in _entries(view.head) if entry[1] and entry[3]]
    protective = any(kind == _PROTECTIVE for _, kind, _, _ in entries)
    if protective and any(kind != _PROTECTIVE for _, kind, _, _ in entries):
        report("gpt.hybrid", "the protective MBR has other partitions too", 446)
    if view.total is not None and not protective and "iso" not in report.found:
        for _, _, start, count in entries:
            good = (start + count) * 512 <= view.total
            report.check(good, "mbr.partition", f"a partition ends at sector {start + count}", 446)


def _header(block: bytes, sector: int, lba: int) -> bool:
    """Whether this is a sound GPT header that says it is at this place."""
    size, crc = struct.unpack_from("<II", block, 12)
    if block[:8] != b"EFI PART" or block[8:12] != b"\0\0\1\0" or not 92 <= size <= min(sector, len(block)):
        return False
    clean = block[:16] + bytes(4) + block[20:size]
    return zlib.crc32(clean) == crc and int.from_bytes(block[24:32], "little") == lba


def parse_gpt(view: View, report: Report) -> None:
    """Header, entries and backup header."""
    sector = 512 if view.head[512:520] == b"EFI PART" else 4096
    block = view.head[sector : 2 * sector]
    if len(block) < sector or not _header(block, sector, 1):
        report("gpt.header", "the header is damaged, or its checksum is wrong", sector)
    if len(block) < 92:
        return
    alternate, first, last = struct.unpack_from("<32xQQQ", block)
    start, count, entry, crc = struct.unpack_from("<72xQIII", block)
    if entry < 128 or entry & (entry - 1) or count * entry > _TABLE_MAX:
        report("gpt.entries", f"{count} entries of {entry} bytes", sector + 80)
        return
    report.check(first <= last + 1, "gpt.header", "the usable space is negative", sector + 40)
    table = view.at(start * sector, count * entry)
    if table is None:
        beyond = view.beyond(start * sector, count * entry)
        if beyond:
            report("gpt.entries", "the table is behind the end", sector + 72)
        elif view.total is not None:
            report("gpt.unverified", "the table could not be captured", sector + 72)
            report.verified = "head"
    else:
        report.check(zlib.crc32(table) == crc, "gpt.entries", "the table's checksum is wrong", start * sector)
        partitions = []
        for index in range(count):
            if table.startswith(bytes(16), index * entry):
                continue
            begin, end = struct.unpack_from("<32xQQ", table, index * entry)
            if not first <= begin <= end <= last:
                report("gpt.partition", f"partition {index + 1} is outside of the usable space", start * sector)
            partitions.append((begin, end))
        partitions.sort()
        apart = all(end < begin for (_, end), (begin, _) in pairwise(partitions))
        report.check(apart, "gpt.partition", "two partitions overlap", start * sector)
    if view.total is not None:
        place = alternate * sector
        backup = None if view.beyond(place, sector) else view.at(place, sector)
        good = backup is not None and _header(backup, sector, alternate)
        report.check(
            good and place + sector == view.total - view.total % sector,
            "gpt.backup",
            "there is no sound backup header in the last sector",
            sector + 32,
        )


def parse_ext(view: View, report: Report) -> None:
    """The length in the superblock of ext2, 3 and 4."""
    blocks, log = struct.unpack_from("<4xI16xI", view.head, 1024)
    (incompatible,) = struct.unpack_from("<I", view.head, 1120)
    if incompatible & 0x80:
        blocks |= int.from_bytes(view.head[1360:1364], "little") << 32
    size = blocks * (1024 << log)
    report.sizes.append(("ext superblock", size))
    report.check(not view.beyond(0, size), "ext.truncated", f"the file system has {size} bytes", 1028)
