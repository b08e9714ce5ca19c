"""ISO 9660 (ECMA-119) and UDF (ECMA-167)."""

from __future__ import annotations

import struct
from typing import Final

from imagestore.formats._findings import Report
from imagestore.formats._window import View

__all__ = ["parse_iso", "parse_udf"]

_START: Final = 32768
_STEP: Final = 2048
_DESCRIPTORS: Final = 64
_BRIDGE: Final = frozenset({b"BEA01", b"NSR02", b"NSR03", b"TEA01", b"BOOT2", b"CDW02"})


def parse_iso(view: View, report: Report) -> None:
    """The volume descriptors; the largest volume is the size that counts."""
    head = view.head
    primary, ended = False, False
    for index in range(_DESCRIPTORS):
        at = _START + index * _STEP
        block = head[at : at + _STEP]
        if len(block) < _STEP:
            report("iso.descriptor", "the image ends inside the volume descriptors", at)
            return
        if block[1:6] in _BRIDGE:
            break
        if block[1:6] != b"CD001":
            report("iso.descriptor", "something else among the volume descriptors", at)
            return
        if block[0] == 255:
            ended = True
            break
        # Enhanced descriptors (ISO 9660:1999) are supplementary ones of version 2.
        report.check(
            block[6] == 1 or (block[0] == 2 and block[6] == 2), "iso.descriptor", f"version {block[6]}", at + 6
        )
        report.check(block[0] <= 3, "iso.descriptor", f"a descriptor of type {block[0]}", at)
        if block[0] == 1:
            primary = True
        if block[0] in {1, 2}:
            _volume(block, at, view, report)
    report.check(primary, "iso.descriptor", "there is no primary volume descriptor", _START)
    report.check(ended, "iso.descriptor", "the volume descriptors have no end", _START)


def _volume(block: bytes, at: int, view: View, report: Report) -> None:
    little, big = struct.unpack("<I", block[80:84])[0], struct.unpack(">I", block[84:88])[0]
    unit, unit_big = struct.unpack("<H", block[128:130])[0], struct.unpack(">H", block[130:132])[0]
    report.check(little == big and unit == unit_big, "iso.endian", "the two byte orders disagree", at + 80)
    report.sizes.append(("iso volume", max(little, big) * max(unit, unit_big)))
    good = unit in {512, 1024, 2048}
    report.check(good, "iso.descriptor", f"blocks of {unit} bytes", at + 128)
    size = max(little, big) * unit
    report.check(not view.beyond(0, size), "iso.truncated", f"the volume has {size} bytes", at + 80)


def parse_udf(view: View, report: Report) -> None:
    """Whether the recognition sequence has its begin and end."""
    head = view.head
    names = [head[at + 1 : at + 6] for at in range(_START, _START + _DESCRIPTORS * _STEP, _STEP)]
    first = next(index for index, name in enumerate(names) if name in {b"NSR02", b"NSR03"})
    good = b"BEA01" in names[:first] and b"TEA01" in names[first:]
    report.check(good, "iso.descriptor", "the UDF recognition sequence has no begin or no end", _START)
