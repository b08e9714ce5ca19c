"""QCOW2 and QCOW (QEMU's ``docs/interop/qcow2`` and ``block/qcow.c``), QED (``docs/interop/qed_spec``)."""

from __future__ import annotations

import struct
import zlib
from typing import Final

from imagestore.formats._findings import Broken, Report
from imagestore.formats._guest import check_guest
from imagestore.formats._window import View

__all__ = ["parse_qcow", "parse_qcow2", "parse_qed"]

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_RAW_DATA_FILE: Final = 1 << 1
_ENTRY: Final = 0x00FF_FFFF_FFFF_FE00
_MIB: Final = 1 << 20
_EXTENSIONS: Final = 64
_EXTENSION_ROOM: Final = 64 << 10

_BACKING_FORMAT: Final = 0xE2792ACA
_FEATURE_NAMES: Final = 0x6803F857
_BITMAPS: Final = 0x23852875
_LUKS: Final = 0x0537BE77
_DATA_FILE_NAME: Final = 0x44415441


def parse_qcow2(view: View, report: Report) -> None:
    """Versions 2 and 3."""
    head = view.head
    if len(head) < _HEADER.size:
        raise Broken("qcow2.header", f"the image ends inside the header, after {len(head)} bytes", len(head))
    (_, version, backing, backing_size, bits, size, crypt, l1_size, l1, refcounts, refcount_clusters, snapshots,
     snapshot_table) = _HEADER.unpack_from(head)  # fmt: skip
    report.sizes.append(("qcow2 header", size))
    if version not in {2, 3}:
        raise Broken("qcow2.version", f"version {version}", 4)
    if backing or backing_size:
        report("qcow2.backing_file", "the header names a backing file", 8)
    incompatible, length = 0, 72
    if version == 3:
        incompatible, length = _version_3(head, report)
    _encryption(crypt, report)
    if not 9 <= bits <= 21:
        raise Broken("qcow2.cluster_size", f"2^{bits} bytes", 20)
    cluster = 1 << bits
    if incompatible & _EXTENDED_L2:
        report("qcow2.extended_l2", "incompatible feature bit 4 is set", 72)
        report.check(bits >= 14, "qcow2.cluster_size", f"2^{bits} bytes is too small for subclusters", 20)
    report.check(length <= cluster, "qcow2.header", f"the header has {length} bytes, a cluster {cluster}", 100)
    stop = min(cluster, backing) if backing else cluster
    _extensions(head, min(length, cluster), stop, crypt, cluster, view, report)

    if size >= 1 << 63:
        report("qcow2.size", f"{size} bytes", 24)
    entries = cluster // (16 if incompatible & _EXTENDED_L2 else 8)
    need = -(-size // (cluster * entries))
    report.check(need <= l1_size, "qcow2.size", f"{size} bytes need {need} entries of level 1, not {l1_size}", 24)

    def table(what: str, start: int, bytes_: int, most: int, field: int) -> bool:
        good = report.check(bytes_ <= most, "qcow2.tables", f"the {what} has {bytes_} bytes", field)
        good &= report.check(
            start >= cluster and start % cluster == 0, "qcow2.tables", f"the {what} is misplaced: {start}", field
        )
        return good and report.check(
            not view.beyond(start, bytes_), "qcow2.tables", f"the {what} is behind the end", field
        )

    sound = l1_size > 0 and table("level 1 table", l1, l1_size * 8, 32 * _MIB, 40)
    report.check(refcount_clusters >= 1, "qcow2.tables", "there is no refcount table", 56)
    table("refcount table", refcounts, refcount_clusters * cluster, 8 * _MIB, 48)
    if snapshots:
        report("qcow2.snapshots", f"{snapshots} internal snapshots", 60)
        report.check(snapshots <= 65536, "qcow2.tables", f"{snapshots} snapshots", 60)
        # An entry has at least 40 bytes.
        table("snapshot table", snapshot_table, snapshots * 40, 64 * _MIB, 64)
    if sound and not crypt and not incompatible & _DATA_FILE:
        _guest(view, report, l1, bits, incompatible)


def _version_3(head: bytes, report: Report) -> tuple[int, int]:
    """Feature bits and length of the header."""
    if len(head) < 104:
        raise Broken("qcow2.header", f"the image ends inside the header, after {len(head)} bytes", len(head))
    incompatible, compatible, autoclear, order, length = struct.unpack_from(">QQQII", head, 72)
    if incompatible & _DATA_FILE:
        report("qcow2.data_file", "incompatible feature bit 2 is set", 72)
    if autoclear & _RAW_DATA_FILE:
        report("qcow2.data_file", "autoclear feature bit 1 is set", 88)
    if incompatible & _DIRTY:
        report("qcow2.dirty", "incompatible feature bit 0 is set", 72)
    if incompatible & _CORRUPT:
        report("qcow2.corrupt", "incompatible feature bit 1 is set", 72)
    if incompatible >> 5:
        report("qcow2.features", f"incompatible features {incompatible:#x}", 72)
    if compatible >> 1 or autoclear >> 2:
        report("qcow2.unknown_feature", f"compatible {compatible:#x}, autoclear {autoclear:#x}", 80)
    report.check(order <= 6, "qcow2.header", f"refcount order {order}", 96)
    if not report.check(length >= 104 and length % 8 == 0, "qcow2.header", f"a length of {length} bytes", 100):
        length = max(length, 104)
    kind = head[104] if length > 104 and len(head) > 104 else 0
    if length > 104:
        report.check(not any(head[105 : min(112, length)]), "qcow2.header", "the padding is not zero", 105)
    zstd = bool(incompatible & _COMPRESSION)
    if kind > 1 or zstd != (kind != 0):
        report("qcow2.compression", f"type {kind}, and feature bit 3 is {'set' if zstd else 'clear'}", 104)
    return incompatible, length


def _encryption(crypt: int, report: Report) -> None:
    if crypt == 1:
        report("qcow2.aes", "encryption method 1", 32)
    elif crypt == 2:
        report("qcow2.encrypted", "encryption method 2 (LUKS)", 32)
    elif crypt:
        report("qcow2.encryption", f"encryption method {crypt}", 32)


def _extensions(head: bytes, start: int, stop: int, crypt: int, cluster: int, view: View, report: Report) -> None:
    """Header extensions, which start behind the header and end with the first cluster at the latest."""
    stop = min(stop, _EXTENSION_ROOM)
    seen: set[int] = set()
    for _ in range(_EXTENSIONS):
        if start + 8 > stop:
            break
        if start + 8 > len(head):
            report("qcow2.extension", "the image ends inside the header extensions", start)
            break
        kind, length = struct.unpack_from(">II", head, start)
        if kind == 0:
            if head[start + 8 : stop].rstrip(b"\0"):
                report("qcow2.slack", "there is data behind the last header extension", start + 8)
            break
        data = start + 8
        if length > stop - data:
            report("qcow2.extension", f"extension {kind:#x} of {length} bytes runs over its room", start)
            break
        if data + length > len(head):
            report("qcow2.extension", "the image ends inside the header extensions", start)
            break
        if kind in seen:
            report("qcow2.extension", f"extension {kind:#x} stands there twice", start)
        seen.add(kind)
        if kind == _DATA_FILE_NAME:
            report("qcow2.data_file", "a header extension names a data file", start)
        elif kind == _BACKING_FORMAT:
            report("qcow2.backing_format", "a backing format is named", start)
        elif kind == _FEATURE_NAMES:
            report.check(length % 48 == 0, "qcow2.feature_names", f"the feature names have {length} bytes", start)
        elif kind == _BITMAPS:
            _bitmaps(head[data : data + length], view, cluster, start, report)
        elif kind == _LUKS:
            pointer = struct.unpack(">QQ", head[data : data + 16]) if length == 16 else None
            good = crypt == 2 and pointer is not None and pointer[0] >= cluster and pointer[0] % cluster == 0
            report.check(
                good and pointer is not None and not view.beyond(*pointer),
                "qcow2.encryption",
                "the pointer to the LUKS header is wrong",
                start,
            )
        else:
            report("qcow2.unknown_extension", f"extension {kind:#x}", start)
        start = data + (length + 7) // 8 * 8
    else:
        report("qcow2.extension", f"more than {_EXTENSIONS} header extensions", start)
    if crypt == 2 and _LUKS not in seen:
        report("qcow2.encryption", "there is no pointer to the LUKS header", 32)


def _bitmaps(data: bytes, view: View, cluster: int, offset: int, report: Report) -> None:
    if not report.check(len(data) == 24, "qcow2.extension", f"the bitmaps extension has {len(data)} bytes", offset):
        return
    count, _, size, start = struct.unpack(">IIQQ", data)
    good = 0 < count <= 65535 and size <= 64 * _MIB and start >= cluster and start % cluster == 0
    report.check(good and not view.beyond(start, size), "qcow2.extension", "the bitmap directory is impossible", offset)


def _guest(view: View, report: Report, l1: int, bits: int, incompatible: int) -> None:
    """The first sector of the guest's disk, where the chain of tables to it does not lead backwards."""
    entry = view.at(l1, 8)
    l2 = 0 if entry is None else int.from_bytes(entry, "big") & _ENTRY
    entry = view.at(l2, 8) if l2 else None
    if entry is None:
        return
    value = int.from_bytes(entry, "big")
    if value >> 62 & 1:
        if incompatible & _COMPRESSION:
            return
        shift = 62 - (bits - 8)
        start = value & ((1 << shift) - 1)
        length = ((value >> shift & ((1 << (bits - 8)) - 1)) + 1) * 512 - start % 512
        if view.total is not None:
            length = min(length, view.total - start)
        packed = view.at(start, length) if length > 0 else None
        if packed is not None:
            try:
                check_guest(zlib.decompressobj(-15).decompress(packed, 512), start, report)
            except zlib.error:
                report("qcow2.tables", "the first compressed cluster can't be unpacked", start)
    elif value & _ENTRY and not value & 1:
        check_guest(view.at(value & _ENTRY, 512), value & _ENTRY, report)


def parse_qcow(view: View, report: Report) -> None:
    """QCOW version 1."""
    head = view.head
    report("qcow.version1", "this is qcow version 1", 4)
    if len(head) < 48:
        raise Broken("qcow2.header", "the image ends inside the header", len(head))
    backing, backing_size, _, size = struct.unpack_from(">QIIQ", head, 8)
    report.sizes.append(("qcow header", size))
    if backing or backing_size:
        report("qcow.backing_file", "the header names a backing file", 8)


def parse_qed(view: View, report: Report) -> None:
    """QED."""
    head = view.head
    report("qed.found", "this is QED", 0)
    if len(head) < 64:
        raise Broken("qed.header", "the image ends inside the header", len(head))
    cluster, table, header, features = struct.unpack_from("<IIIQ", head, 4)
    size, name, length = struct.unpack_from("<QII", head, 48)
    report.sizes.append(("qed header", size))
    power = cluster & (cluster - 1) == 0 and 1 << 12 <= cluster <= 1 << 26
    report.check(power and 1 <= table <= 16 and header >= 1, "qed.header", "impossible table or cluster sizes", 4)
    if features & 1 or name or length:
        report("qed.backing_file", "the header names a backing file", 16)
