"""VDI (VirtualBox; facts as in QEMU's ``block/vdi.c``) and ploop (QEMU's ``docs/interop/parallels``)."""

from __future__ import annotations

import struct
from typing import Final

from imagestore.formats._findings import Broken, Report
from imagestore.formats._guest import check_guest
from imagestore.formats._window import View

__all__ = ["parse_ploop", "parse_vdi"]

_MIB: Final = 1 << 20
_VDI_BLOCKS: Final = 0x1FFF_FF80


def parse_vdi(view: View, report: Report) -> None:
    """Dynamic and static disks without a parent."""
    head = view.head
    if len(head) < 512:
        raise Broken("vdi.header", f"the image ends inside the header, after {len(head)} bytes", len(head))
    version, header, kind = struct.unpack_from("<III", head, 68)
    block_map, data = struct.unpack_from("<II", head, 340)
    sector, _, size, block, extra, blocks, allocated = struct.unpack_from("<IIQIIII", head, 360)
    report.sizes.append(("vdi header", size))
    report.check(version == 0x10001, "vdi.header", f"version {version:#x}", 68)
    report.check(header >= 0x180, "vdi.header", f"a header of {header} bytes", 72)
    if kind in {3, 4}:
        report("vdi.parent", f"type {kind}: undo or differencing", 76)
    else:
        report.check(kind in {1, 2}, "vdi.header", f"type {kind}", 76)
    if any(head[424:456]):
        report("vdi.parent", "the UUID of a parent or link is set", 424)
    report.check(sector == 512 and extra == 0, "vdi.header", f"sectors of {sector} bytes, {extra} extra", 360)
    if not report.check(block == _MIB, "vdi.blocks", f"blocks of {block} bytes", 376):
        return
    report.check(blocks <= _VDI_BLOCKS and allocated <= blocks, "vdi.blocks", f"{allocated} of {blocks} blocks", 384)
    report.check(size <= blocks * block, "vdi.size", f"{size} bytes in {blocks} blocks", 368)
    good = block_map >= 512 and block_map % 512 == 0 and data >= block_map + 4 * blocks and data % 512 == 0
    if not report.check(good, "vdi.blocks", f"block map at {block_map}, data at {data}", 340):
        return
    used = blocks if kind == 2 else allocated
    report.check(not view.beyond(data, used * block), "vdi.blocks", f"{used} blocks are not all there", 388)
    entry = view.at(block_map, 4) if blocks else None
    index = 0xFFFF_FFFF if entry is None else int.from_bytes(entry, "little")
    if index < 0xFFFF_FFFE:
        check_guest(view.at(data + index * block, 512), data + index * block, report)


def parse_ploop(view: View, report: Report) -> None:
    """The image file of a ploop or Parallels disk."""
    head = view.head
    if len(head) < 64:
        raise Broken("ploop.header", f"the image ends inside the header, after {len(head)} bytes", len(head))
    version, _, _, cluster, entries, sectors, in_use, data, _, extension = struct.unpack_from("<5IQ3IQ", head, 16)
    old = head[:16] == b"WithoutFreeSpace"
    report.sizes.append(("ploop header", sectors * 512))
    report.check(version == 2, "ploop.header", f"version {version}", 16)
    if not report.check(0 < cluster <= (2**31 - 1) // 513, "ploop.header", f"clusters of {cluster} sectors", 28):
        return
    report.check(not (old and sectors >> 32), "ploop.header", f"{sectors} sectors", 36)
    if in_use == 0x746F6E59:
        report("ploop.open", "the image was not closed", 44)
    else:
        report.check(in_use in {0, 0x312E3276}, "ploop.header", f"an in-use mark of {in_use:#x}", 44)
    # Older disks count in sectors, newer ones in clusters; both address at most 2^32 of them.
    report.check(entries * cluster >= sectors, "ploop.tables", f"{entries} clusters for {sectors} sectors", 32)
    report.check(entries <= 1 << 29, "ploop.tables", f"{entries} clusters", 32)
    stop = 64 + 4 * entries
    report.check(not data or stop <= data * 512, "ploop.tables", "the block table reaches into the data", 48)
    report.check(not view.beyond(stop) and not view.beyond(data * 512), "ploop.tables", "a table behind the end", 32)
    report.check(not extension or not view.beyond(extension * 512, 64), "ploop.header", "extension behind the end", 56)
    entry = view.at(64, 4) if entries else None
    index = 0 if entry is None else int.from_bytes(entry, "little")
    if index:
        offset = index * 512 * (1 if old else cluster)
        check_guest(view.at(offset, 512), offset, report)
