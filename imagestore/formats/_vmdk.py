"""VMDK (VMware Virtual Disk Format 1.1 and 5.0): sparse extents in one file, without a parent; nothing else."""

from __future__ import annotations

import re
import struct
from typing import Final

from imagestore.formats._findings import Broken, Report
from imagestore.formats._guest import check_guest
from imagestore.formats._window import View

__all__ = ["parse_vmdk"]

# Signature, version, flags, capacity, grain size, descriptor offset and size, entries per table, redundant
# directory, directory, overhead, unclean, line ends, compression. Lengths are in sectors.
_HEADER: Final = struct.Struct("<4sIIQQQQIQQQB4sH")
_AT_END: Final = 2**64 - 1
_REDUNDANT, _COMPRESSED, _MARKERS = 2, 0x10000, 0x20000
_DESCRIPTOR_MAX: Final = 64 << 10

_COMMENT_BARRED: Final = re.compile(r"createtype|parentfilenamehint|cid|rw ", re.IGNORECASE)
_SINGLE: Final = {
    "version": re.compile(r"version=[123]"),
    "encoding": re.compile(r'encoding="[A-Za-z0-9._:-]+"'),
    "CID": re.compile(r"CID=[0-9A-Fa-f]{1,8}"),
    "parentCID": re.compile(r"parentCID=[0-9A-Fa-f]{1,8}"),
    "isNativeSnapshot": re.compile(r'isNativeSnapshot="no"'),
    "createType": re.compile(r'createType="[^"]*"'),
}
_EXTENT: Final = re.compile(r'(?:RW|RDONLY) (\d{1,19}) SPARSE "[^"/\\:]+"')
_DATABASE: Final = re.compile(r'(ddb\.[A-Za-z0-9._]+)[ \t]*=[ \t]*"([^"]*)"')
_KINDS: Final = frozenset({"monolithicSparse", "streamOptimized"})


def parse_vmdk(view: View, report: Report) -> None:
    """One sparse extent with its descriptor; whatever else is called VMDK is named and refused."""
    head = view.head
    if head[:4] == b"COWD":
        report("vmdk.cowd", "this is an extent of another disk", 0)
        if len(head) >= 16:
            report.sizes.append(("vmdk header", int.from_bytes(head[12:16], "little") * 512))
    elif head[:8] == b"\xbe\xba\xfe\xca\0\0\0\0":
        report("vmdk.sesparse", "this is an extent of another disk", 0)
    elif head[:4] == b"KDMV":
        _sparse(view, report)
    else:
        report("vmdk.text_descriptor", "this is a descriptor in text form", 0)
        _text(head[:_DESCRIPTOR_MAX].partition(b"\0")[0], 0, None, report)


def _sparse(view: View, report: Report) -> None:
    head = view.head
    if len(head) < 512:
        raise Broken("vmdk.header", f"the image ends inside the header, after {len(head)} bytes", len(head))
    header = _HEADER.unpack_from(head)
    (_, version, flags, capacity, grain, descriptor, descriptor_size, entries, redundant, directory, overhead,
     unclean, ends, compression) = header  # fmt: skip
    report.sizes.append(("vmdk header", capacity * 512))
    if version not in {1, 2, 3}:
        raise Broken("vmdk.version", f"version {version}", 4)
    if flags & ~0x30007:
        report("vmdk.flags", f"flags {flags:#x}", 8)
    if capacity == 0:
        report("vmdk.capacity_zero", "the header's capacity is 0", 12)
    report.check(capacity < 1 << 54, "vmdk.capacity", f"{capacity} sectors", 12)
    power = grain & (grain - 1) == 0
    good_grain = report.check(power and 8 <= grain <= 1 << 21, "vmdk.header", f"grains of {grain} sectors", 20)
    good_entries = report.check(1 <= entries <= 512, "vmdk.header", f"{entries} entries per table", 44)
    if good_grain and good_entries:
        tables = -(-capacity // (grain * entries))
        report.check(tables <= 1 << 25, "vmdk.capacity", f"{tables} grain tables", 12)
    if unclean:
        report("vmdk.unclean", "the disk was not closed", 72)
    report.check(ends == b"\n \r\n", "vmdk.header", "the line ends were converted as in a text", 73)
    compressed = flags & (_COMPRESSED | _MARKERS)
    good = compression <= 1 and (compression == 1) == bool(flags & _COMPRESSED)
    good &= compressed in {0, _COMPRESSED | _MARKERS}
    report.check(good, "vmdk.header", f"compression {compression} with flags {flags:#x}", 77)
    report.check(not any(head[79:512]), "vmdk.header", "the padding is not zero", 79)

    def within(what: str, sector: int, field: int) -> bool:
        good = 0 < sector < 1 << 54 and not view.beyond(sector * 512, 4)
        return report.check(good, "vmdk.tables", f"the {what} is at sector {sector}", field)

    report.check(not view.beyond(overhead * 512), "vmdk.tables", f"{overhead} sectors of overhead", 64)
    if flags & _REDUNDANT and redundant != _AT_END:
        within("redundant directory", redundant, 48)
    if directory == _AT_END:
        if view.total is not None:
            _footer(view, header, report)
    elif within("grain directory", directory, 56) and not compressed and capacity:
        _guest(view, directory, report)

    if descriptor == 0 and descriptor_size == 0:
        report("vmdk.no_descriptor", "there is no descriptor", 28)
        return
    if descriptor != 1 or not 1 <= descriptor_size <= _DESCRIPTOR_MAX // 512:
        raise Broken("vmdk.header", f"a descriptor of {descriptor_size} sectors at sector {descriptor}", 28)
    stop = 512 + descriptor_size * 512
    if view.beyond(stop):
        raise Broken("vmdk.tables", "the image ends inside the descriptor", 36)
    report.check(directory == _AT_END or directory * 512 >= stop, "vmdk.tables", "directory over descriptor", 56)
    text, _, rest = head[512:stop].partition(b"\0")
    report.check(not rest.rstrip(b"\0"), "vmdk.embedded_text", "data follows the NUL that ends it", 512 + len(text))
    if not text:
        report("vmdk.no_descriptor", "the descriptor is empty", 512)
        return
    _text(text, capacity, bool(compressed), report)


def _footer(view: View, header: tuple[object, ...], report: Report) -> None:
    """What stands at the end replaces the header for some readers, so all that matters must be the same."""
    assert view.total is not None
    start = view.total - 1536
    marker, footer, end = view.tail[-1536:-1024], view.tail[-1024:-512], view.tail[-512:]
    if start < 512 or view.total % 512 or footer[:4] != b"KDMV":
        raise Broken("vmdk.footer", "there is no footer at the end", max(start, 0))
    good = struct.unpack_from("<QII", marker) == (1, 0, 3) and not any(end)
    report.check(good, "vmdk.footer", "the markers around it are wrong", start)
    other = _HEADER.unpack_from(footer)
    report.sizes.append(("vmdk footer", int(other[3]) * 512))
    # All but the directories and the unclean flag.
    if [*header[:8], header[10], *header[12:]] != [*other[:8], other[10], *other[12:]] or any(footer[79:]):
        report("vmdk.footer_differs", "header and footer differ", start + 512)
    directory = int(other[9])
    good = 0 < directory < 1 << 54 and directory * 512 < start
    report.check(good, "vmdk.footer", "the footer's grain directory is misplaced", start + 512 + 56)
    if other[11]:
        report("vmdk.unclean", "the disk was not closed", start + 512 + 72)


def _guest(view: View, directory: int, report: Report) -> None:
    table = view.at(directory * 512, 4)
    sector = 0 if table is None else int.from_bytes(table, "little")
    grain = view.at(sector * 512, 4) if sector else None
    sector = 0 if grain is None else int.from_bytes(grain, "little")
    if sector > 1:  # 0 is a hole, 1 a grain of zeros
        check_guest(view.at(sector * 512, 512), sector * 512, report)


def _text(text: bytes, capacity: int, compressed: bool | None, report: Report) -> None:
    """The descriptor, by a grammar without room: readers search it in ways that differ. `compressed` is None
    for a text on its own, of which only what it names is told.
    """
    embedded = compressed is not None
    offset = 512 if embedded else 0
    if b"\r" in text.replace(b"\r\n", b"\n"):
        report("vmdk.embedded_text", "a carriage return that ends no line", offset)
    try:
        lines = text.decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError:
        if embedded:
            report("vmdk.embedded_text", "the descriptor is not UTF-8", offset)
        lines = text.decode("latin-1").replace("\r\n", "\n").split("\n")
    unicode = 'encoding="UTF-8"' in lines
    single: dict[str, str] = {}
    extents = []
    for number, line in enumerate(lines, 1):
        plain = all(" " <= sign <= "~" or sign == "\t" for sign in line)
        database = _DATABASE.fullmatch(line)
        extent = _EXTENT.fullmatch(line)
        key = line.partition("=")[0]
        if not plain and embedded and not (unicode and line.isprintable() and (database or line.startswith("#"))):
            report("vmdk.embedded_text", f"line {number} has bytes that are no plain text", offset)
        if not line.strip(" \t"):
            continue
        if line.startswith("#"):
            barred = _COMMENT_BARRED.search(line)
            report.check(
                not barred or not embedded, "vmdk.descriptor", f"line {number}: a keyword in a comment", offset
            )
        elif database:
            if database[1].lower().startswith("ddb.uuid.parent") and re.search(r"[1-9A-Fa-f]", database[2]):
                report("vmdk.parent", f"line {number}: a parent's UUID", offset)
        elif extent:
            extents.append(int(extent[1]))
        elif key in _SINGLE and _SINGLE[key].fullmatch(line) and key not in single:
            single[key] = line.partition("=")[2].strip('"')
        elif key.strip().lower() == "parentfilenamehint":
            report("vmdk.parent", f"line {number} names a parent", offset)
        elif embedded:
            report("vmdk.descriptor", f"line {number} is not of the strict grammar", offset)
    if single.get("parentCID", "ffffffff").lower() != "ffffffff":
        report("vmdk.parent", "the content id of a parent", offset)
    kind = single.get("createType")
    if kind is not None and kind not in _KINDS:
        report("vmdk.create_type", "neither monolithicSparse nor streamOptimized", offset)
    if not embedded:
        return
    report.check(
        "version" in single and kind is not None, "vmdk.embedded_text", "version or createType is missing", 512
    )
    if kind in _KINDS:
        same = (kind == "streamOptimized") == compressed
        report.check(same, "vmdk.header", "createType and the compression in the header disagree", 8)
    good = extents == [capacity]
    report.check(good, "vmdk.capacity", f"extents of {extents[:4]} sectors, but a capacity of {capacity}", 512)
    report.sizes.append(("vmdk descriptor", sum(extents) * 512))
