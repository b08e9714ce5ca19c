"""VHD (Virtual Hard Disk Image Format Specification 1.0) and VHDX (MS-VHDX)."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from imagestore.formats._crc32c import crc32c
from imagestore.formats._findings import Broken, Report
from imagestore.formats._guest import check_guest
from imagestore.formats._window import View

__all__ = ["parse_vhd", "parse_vhdx"]

_NOWHERE: Final = 2**64 - 1
_VHD_MAX: Final = 2040 << 30
_GEOMETRY_MAX: Final = (65535, 16, 255)
# Creators whose images readers size by the size field alone; all others by the geometry.
_SIZED: Final = frozenset({b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0"})

_MIB: Final = 1 << 20
_VHDX_MAX: Final = 64 << 40


def parse_vhd(view: View, report: Report) -> None:
    """Dynamic disks have the footer at the end and a copy at the start, fixed ones only the footer."""
    dynamic = view.head[:8] == b"conectix"
    footer = _footer(view) if view.total is not None else None
    if dynamic:
        if len(view.head) < 512:
            raise Broken("vhd.footer", "the image ends inside the header", len(view.head))
        first = view.head[:512]
        _check_footer(first, 0, report, dynamic=True)
        _dynamic_header(first, view, report)
        if view.total is not None:
            if footer is None:
                report("vhd.footer", "there is no footer at the end", view.total)
            elif footer[0] != first[: len(footer[0])]:
                report("vhd.copies_differ", "the footer and its copy at the start differ", footer[1])
    elif footer is not None:
        _check_footer(footer[0].ljust(512, b"\0"), footer[1], report, dynamic=False)


def _footer(view: View) -> tuple[bytes, int] | None:
    """The footer and its offset. Virtual PC before 2004 wrote 511 bytes."""
    assert view.total is not None
    for length in (512, 511):
        if view.tail[-length : 8 - length] == b"conectix":
            return view.tail[-length:], view.total - length
    return None


def _sum(data: bytes, field: int) -> int:
    return ~(sum(data) - sum(data[field : field + 4])) & 0xFFFF_FFFF


def _check_footer(footer: bytes, offset: int, report: Report, *, dynamic: bool) -> None:
    features, version, data_offset = struct.unpack_from(">IIQ", footer, 8)
    creator = footer[28:32]
    original, current, cylinders, heads, sectors, kind, checksum = struct.unpack_from(">QQHBBII", footer, 40)
    geometry = cylinders * heads * sectors * 512
    report.sizes.append(("vhd current size", current))
    if kind == 4:
        report("vhd.parent", "disk type 4: differencing", offset + 60)
    elif kind not in {2, 3} or (kind == 3) != dynamic:
        report("vhd.footer", f"disk type {kind}", offset + 60)
    report.check(_sum(footer, 64) == checksum, "vhd.checksum", "the footer's checksum is wrong", offset + 64)
    report.check(version == 0x10000 and bool(features & 2), "vhd.footer", f"version {version:#x}", offset + 12)
    if footer[84]:
        report("vhd.saved_state", "the disk belongs to a saved state", offset + 84)
    report.check(not any(footer[85:]), "vhd.footer", "the reserved bytes are not zero", offset + 85)
    report.check(current % 512 == 0 and current <= _VHD_MAX, "vhd.size", f"{current} bytes", offset + 48)
    if original != current:
        report("vhd.original_size", f"originally {original} bytes, now {current}", offset + 40)
    if (cylinders, heads, sectors) != _GEOMETRY_MAX:
        report.sizes.append(("vhd geometry", geometry))
        report.check(geometry <= current, "vhd.geometry", f"a geometry of {geometry} bytes", offset + 56)
    elif creator not in _SIZED and current < geometry:
        report("vhd.geometry", "the largest geometry on a small disk", offset + 56)
    if not dynamic:
        report.check(data_offset == _NOWHERE, "vhd.footer", "a fixed disk with a dynamic header", offset + 16)
        report.check(offset == current, "vhd.size", f"{current} bytes, but {offset} before the footer", offset + 48)


def _dynamic_header(footer: bytes, view: View, report: Report) -> None:
    offset = int.from_bytes(footer[16:24], "big")
    size = int.from_bytes(footer[48:56], "big")
    if offset < 512 or offset % 512 or view.beyond(offset, 1024 + 511):
        raise Broken("vhd.dynamic_header", f"it can't be at {offset}", 16)
    header = view.at(offset, 1024)
    if header is None:
        if view.total is not None:
            raise Broken("vhd.dynamic_header", "it is at a place that had passed when it was known", offset)
        return
    if header[:8] != b"cxsparse":
        raise Broken("vhd.dynamic_header", "the signature is missing", offset)
    _, table, version, entries, block, checksum = struct.unpack_from(">QQIIII", header, 8)
    report.check(_sum(header, 36) == checksum, "vhd.checksum", "the dynamic header's checksum is wrong", offset + 36)
    report.check(version == 0x10000, "vhd.dynamic_header", f"version {version:#x}", offset + 24)
    if any(header[40:56]) or any(header[64:768]):
        report("vhd.parent", "the dynamic header names a parent", offset + 40)
    report.check(not any(header[768:]), "vhd.dynamic_header", "the reserved bytes are not zero", offset + 768)
    power = block >= 512 and block & (block - 1) == 0 and block <= 1 << 28
    if not report.check(power, "vhd.dynamic_header", f"blocks of {block} bytes", offset + 32):
        return
    report.check(entries <= 1 << 22, "vhd.dynamic_header", f"{entries} blocks", offset + 28)
    report.check(entries * block >= size, "vhd.size", f"{entries} blocks of {block} bytes hold no {size}", offset + 28)
    overlaps = table < 512 or (table < offset + 1024 and table + entries * 4 > offset)
    good = table % 512 == 0 and not overlaps and not view.beyond(table, entries * 4 + 511)
    if not report.check(good, "vhd.dynamic_header", f"the block table can't be at {table}", offset + 16) or not entries:
        return
    entry = view.at(table, 4)
    sector = 0xFFFF_FFFF if entry is None else int.from_bytes(entry, "big")
    if sector != 0xFFFF_FFFF:
        # A bitmap, a bit per sector, comes before the data of a block.
        data = (sector + -(-block // 512 // 8 // 512)) * 512
        check_guest(view.at(data, 512), data, report)


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


_BAT: Final = _guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
_METADATA: Final = _guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
_PARAMETERS: Final = _guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
_DISK_SIZE: Final = _guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
_PAGE_83: Final = _guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
_LOGICAL: Final = _guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
_PHYSICAL: Final = _guid("CDA348C7-445D-4471-9CC9-E9885251C556")
_LOCATOR: Final = _guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
_LENGTHS: Final = {_PARAMETERS: 8, _DISK_SIZE: 8, _PAGE_83: 16, _LOGICAL: 4, _PHYSICAL: 4}


def parse_vhdx(view: View, report: Report) -> None:
    """VHDX: headers, region tables, and the metadata wherever it is."""
    if len(view.head) < _MIB:
        raise Broken("vhdx.header", "the image ends before its first MiB", len(view.head))
    _headers(view, report)
    regions = _regions(view, report)
    metadata = regions.get(_METADATA)
    if metadata is None or _BAT not in regions:
        raise Broken("vhdx.regions", "the block table or the metadata is missing", 192 << 10)
    _metadata(view, report, *metadata, regions[_BAT])


def _headers(view: View, report: Report) -> None:
    valid = []
    for offset in (64 << 10, 128 << 10):
        block = view.head[offset : offset + 4096]
        crc, sequence = struct.unpack_from("<IQ", block, 4)
        version = int.from_bytes(block[66:68], "little")
        if block[:4] == b"head" and crc32c(block[:4] + bytes(4) + block[8:]) == crc and version == 1:
            valid.append((sequence, offset, block))
    if not valid:
        raise Broken("vhdx.header", "both headers are damaged", 64 << 10)
    valid.sort()
    if len(valid) == 2 and valid[0][0] == valid[1][0] and valid[0][2] != valid[1][2]:
        report("vhdx.header", "the two headers differ and neither is newer", 64 << 10)
    _, offset, block = valid[-1]
    if any(block[48:64]):
        report("vhdx.log", "the log has not been replayed", offset + 48)
    log_version, _, length, log = struct.unpack_from("<HHIQ", block, 64)
    good = log_version == 0 and log % _MIB == 0 and length % _MIB == 0 and (length == 0 or log >= _MIB)
    report.check(good and not view.beyond(log, length), "vhdx.header", "the log is misplaced", offset + 64)
    if length:
        report.facts.add(f"vhdx-log:{log}:{length}")


def _regions(view: View, report: Report) -> dict[bytes, tuple[int, int]]:
    start = 192 << 10
    first, second = view.head[start : start + 65536], view.head[start + 65536 : start + 131072]
    for offset, table in ((start, first), (start + 65536, second)):
        crc, count = struct.unpack_from("<II", table, 4)
        if table[:4] != b"regi" or crc32c(table[:4] + bytes(4) + table[8:]) != crc or count > 2047:
            raise Broken("vhdx.regions", "the region table is damaged", offset)
    if first != second:
        report("vhdx.tables_differ", "the two region tables differ", start + 65536)
    (count,) = struct.unpack_from("<I", first, 8)
    regions: dict[bytes, tuple[int, int]] = {}
    taken = [tuple(map(int, fact.split(":")[1:])) for fact in report.facts if fact.startswith("vhdx-log:")]
    for index in range(count):
        at = 16 + 32 * index
        guid = first[at : at + 16]
        offset, length, flags = struct.unpack_from("<QII", first, at + 16)
        if guid not in {_BAT, _METADATA}:
            report.check(not flags & 1, "vhdx.regions", "a required region is not known", start + at)
        good = guid not in regions and offset >= _MIB and offset % _MIB == 0 and length % _MIB == 0 and length > 0
        if not good or view.beyond(offset, length):
            raise Broken("vhdx.regions", "a region is misplaced, or stands there twice", start + at)
        regions[guid] = (offset, length)
        taken.append((offset, length))
    taken.sort()
    for (offset, length), (following, _) in pairwise(taken):
        report.check(offset + length <= following, "vhdx.regions", "two regions overlap", start)
    return regions


def _items(table: bytes, offset: int, length: int, report: Report) -> Iterator[tuple[bytes, int, int, int]]:
    (count,) = struct.unpack_from("<H", table, 10)
    if table[:8] != b"metadata" or count > 2047:
        raise Broken("vhdx.metadata", "the metadata table is damaged", offset)
    for index in range(count):
        at = 32 + 32 * index
        where, size, flags = struct.unpack_from("<III", table, at + 16)
        # A zero-length item has no place at all.
        good = size <= _MIB and (where >= 65536 or size == 0) and where + size <= length
        report.check(good, "vhdx.metadata", "an item is misplaced", offset + at)
        yield table[at : at + 16], where, size, flags


def _metadata(view: View, report: Report, offset: int, length: int, bat: tuple[int, int]) -> None:
    # In one piece: once the stream is there, nothing in it can be asked for a second time.
    region = view.at(offset, min(length, _MIB))
    if region is None:
        if view.total is not None:
            raise Broken("vhdx.metadata", "it can't be captured", offset)
        return
    values: dict[bytes, bytes] = {}
    for guid, where, size, flags in _items(region[:65536], offset, length, report):
        if guid == _LOCATOR:
            report("vhdx.parent", "there is a parent locator", offset)
            continue
        if guid in values:
            report("vhdx.metadata", "an item stands there twice", offset)
        if guid not in _LENGTHS or flags & 1:
            report.check(not flags & 4, "vhdx.metadata", "a required item is not known", offset)
            continue
        value = region[where : where + size]
        report.check(size == _LENGTHS[guid] == len(value), "vhdx.metadata", f"an item of {size} bytes", offset)
        values[guid] = value[: _LENGTHS[guid]]
    for guid, length in _LENGTHS.items():
        if len(values.get(guid, b"")) != length:
            raise Broken("vhdx.metadata", "a required item is missing or too short", offset)
    block, flags = struct.unpack("<II", values[_PARAMETERS])
    size = int.from_bytes(values[_DISK_SIZE], "little")
    logical = int.from_bytes(values[_LOGICAL], "little")
    report.sizes.append(("vhdx metadata", size))
    if flags & 2:
        report("vhdx.parent", "the file parameters say that there is a parent", offset)
    if not report.check(logical in {512, 4096}, "vhdx.size", f"sectors of {logical} bytes", offset):
        return
    report.check(int.from_bytes(values[_PHYSICAL], "little") in {512, 4096}, "vhdx.size", "physical sectors", offset)
    report.check(size <= _VHDX_MAX and size % logical == 0, "vhdx.size", f"{size} bytes", offset)
    if not report.check(
        _MIB <= block <= 256 * _MIB and block & (block - 1) == 0, "vhdx.size", f"blocks of {block} bytes", offset
    ):
        return
    blocks = -(-size // block)
    # The table has an entry for a sector bitmap after each chunk of 2^23 sectors.
    entries = blocks + (blocks - 1) // ((1 << 23) * logical // block) if blocks else 0
    report.check(entries * 8 <= bat[1], "vhdx.size", f"{entries} blocks don't fit the table", bat[0])
    entry = view.at(bat[0], 8) if entries else None
    state = 0 if entry is None else int.from_bytes(entry, "little")
    if state & 7 in {6, 7}:
        data = state >> 20 << 20
        check_guest(view.at(data, 512), data, report)
