"""Kernels (Linux ``Documentation/arch/x86/boot.rst`` and ``arch/*/booting.rst``) and ramdisks (cpio newc)."""

from __future__ import annotations

import re
import struct
from typing import Final

from imagestore.formats._findings import Report
from imagestore.formats._window import View

__all__ = ["parse_cpio", "parse_kernel"]

_NEWC: Final = re.compile(rb"07070[12][0-9A-Fa-f]{104}")


def parse_kernel(view: View, report: Report) -> None:
    """An x86 kernel tells its length."""
    head = view.head
    if head[0x202:0x206] == b"HdrS" and len(head) >= 0x210:
        setup, size, protocol = head[0x1F1] or 4, *struct.unpack_from("<I", head, 0x1F4), head[0x206:0x208]
        total = (setup + 1) * 512 + size * 16
        # The length is rounded up to 16. Before protocol 2.04 only 16 bits of the size count.
        if int.from_bytes(protocol, "little") >= 0x0204:
            report.check(not view.beyond(0, total - 15), "aki.truncated", f"the kernel has {total} bytes", 0x1F4)


def parse_cpio(view: View, report: Report) -> None:
    """The first header of a cpio archive in the new ASCII format."""
    head = view.head
    if head[:6] in {b"070701", b"070702"}:
        good = _NEWC.match(head) is not None
        if not report.check(good, "ari.header", "the first header is damaged", 0):
            return
        name = int(head[94:102], 16)
        report.check(0 < name <= 4096 and not view.beyond(110, name), "ari.header", f"a name of {name} bytes", 94)
