"""What contents are, by their bytes alone. The first 512 bytes decide as in QEMU's own probing (``block/*.c``)."""

from __future__ import annotations

import re
import struct
from typing import Final

from imagestore.formats._partition import is_fat, is_mbr
from imagestore.formats._tar import checksum_holds
from imagestore.formats._window import View

__all__ = ["compression", "detect", "guess_tar", "probe"]

_CLOOP: Final = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"  # a signature
_TEXT: Final = frozenset(range(0x20, 0x7F)) | {9, 10, 13}
_CREATE_TYPE: Final = re.compile(rb"createtype\s*=", re.IGNORECASE)
_LINES: Final = re.compile(rb"(?:#[^\n]*\n|[ \t]*\r?\n)*version=[123]\r?\n")


def probe(head: bytes) -> set[str]:
    """The disk formats for which QEMU, or another reader that probes, would take these first bytes."""
    found = set()
    if head[:4] == b"QFI\xfb":
        found.add("qcow" if head[4:8] == b"\0\0\0\1" else "qcow2")
    if head[:4] in {b"KDMV", b"COWD"} or head[:8] == b"\xbe\xba\xfe\xca\0\0\0\0" or _vmdk_text(head[:512]):
        found.add("vmdk")
    if head[:8] == b"conectix":
        found.add("vhd")
    if head[:8] == b"vhdxfile":
        found.add("vhdx")
    if head[64:68] == b"\x7f\x10\xda\xbe":
        found.add("vdi")
    if head[:4] == b"QED\0":
        found.add("qed")
    if head[:16] in {b"WithoutFreeSpace", b"WithouFreSpacExt"}:
        found.add("ploop")
    if head[:6] == b"LUKS\xba\xbe":
        found.add("luks")
    if head.startswith(b"Bochs Virtual HD Image"):
        found.add("bochs")
    if head.startswith(_CLOOP):
        found.add("cloop")
    return found


def _vmdk_text(head: bytes) -> bool:
    # A descriptor needs no signature: comments of any bytes and blank lines may come before its first line.
    return head.startswith(b"# Disk DescriptorFile") or _LINES.match(head) is not None


def _wordy_descriptor(head: bytes) -> bool:
    plain = len(head) > 16 and all(byte in _TEXT for byte in head[:16])
    return plain and _CREATE_TYPE.search(head, 0, 65536) is not None


def compression(head: bytes) -> str | None:
    """The compressor whose signature stands at the start."""
    if head[:3] == b"\x1f\x8b\x08" and not head[3:4] > b"\x1f":
        return "gzip"
    if head[:3] == b"BZh" and b"1" <= head[3:4] <= b"9" and head[4:10] in {b"1AY&SY", b"\x17rE8P\x90"}:
        return "bzip2"
    if head[:6] == b"\xfd7zXZ\0":
        return "xz"
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[:1] and head[0] >> 4 == 5):
        return "zstd"
    if head[:4] in {b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18"}:
        return "lz4"
    if head[:9] == b"\x89LZO\0\r\n\x1a\n":
        return "lzop"
    if head[:4] in {b"PK\3\4", b"PK\5\6"}:
        return "zip"
    if head[:6] == b"7z\xbc\xaf\x27\x1c":
        return "7z"
    if head[2:5] == b"-lh" and head[6:7] == b"-":
        return "lha"
    if head[:2] == b"\x1f\x9d" and len(head) > 3 and head[2] & 0x60 == 0 and 9 <= head[2] & 0x1F <= 16:
        return "compress"
    if head[:3] == b"\x5d\0\0" and len(head) >= 13:
        dictionary, size = struct.unpack_from("<IQ", head, 1)
        sane = dictionary & (dictionary - 1) == 0 or dictionary & (dictionary // 3) == dictionary // 3
        if sane and dictionary >= 4096 and (size == 2**64 - 1 or size < 2**48):
            return "lzma"
    return None


def guess_tar(block: bytes) -> bool:
    """Whether these 512 bytes are the first header of a tar file (POSIX, or older without a signature)."""
    if len(block) < 512:
        return False
    if not checksum_holds(block):
        return False
    return block[257:262] == b"ustar" or (block[0] > 0x20 and block[156:157] in {b"\0", b"0", b"5"})


def _filesystems(view: View, head: bytes) -> set[str]:
    found = set()
    if head[1080:1082] == b"\x53\xef" and len(head) >= 2048:
        inodes, blocks, _, _, _, _, log = struct.unpack_from("<7I", head, 1024)
        if inodes and blocks and log <= 6:
            found.add("ext")
    if head[3:11] == b"NTFS    " and head[510:512] == b"\x55\xaa":
        found.add("ntfs")
    elif head[3:11] == b"EXFAT   " and head[510:512] == b"\x55\xaa":
        found.add("exfat")
    elif is_fat(head):
        found.add("fat")
    if head[:4] == b"XFSB":
        found.add("xfs")
    if view.at(65600, 8) == b"_BHRfS_M":
        found.add("btrfs")
    if head[:4] == b"hsqs":
        found.add("squashfs")
    if head[:4] == b"\x45\x3d\xcd\x28":
        found.add("cramfs")
    if head[:8] == b"-rom1fs-":
        found.add("romfs")
    if head[4086:4096] == b"SWAPSPACE2":
        found.add("swap")
    if head[512:520] == b"LABELONE":
        found.add("lvm2")
    return found


def _boot_files(head: bytes) -> set[str]:
    found = set()
    kernel = (
        (head[510:512] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS")
        or head[56:60] in {b"ARM\x64", b"RSC\5"}
        or (head[:2] == b"MZ" and head[4:8] == b"zimg")
        or head[36:40] == b"\x18\x28\x6f\x01"
        or head[:4] in {b"\x7fELF", b"\x27\x05\x19\x56", b"\xd0\x0d\xfe\xed"}
    )
    if kernel:
        found.add("kernel")
    elif head[:2] == b"MZ" and len(head) >= 64:
        start = int.from_bytes(head[60:64], "little")
        if head[start : start + 4] == b"PE\0\0":
            found.add("pe")
    if head[:6] in {b"070701", b"070702", b"070707"} or (head[:2] == b"\xc7\x71" and head[6:8] != b"\0\0"):
        found.add("cpio")
    return found


def _optical(head: bytes) -> set[str]:
    found = set()
    for start in range(32768, 32768 + 64 * 2048, 2048):
        name = head[start + 1 : start + 6]
        if name == b"CD001":
            found.add("iso")
        elif name in {b"NSR02", b"NSR03"}:
            found.add("udf")
        elif name not in {b"BEA01", b"TEA01", b"BOOT2", b"CDW02"}:
            break
    return found


def detect(view: View, report_facts: set[str]) -> set[str]:
    """Everything that these contents are. What only the end tells is found at the end."""
    head = view.head
    found = probe(head)
    if not found and _wordy_descriptor(head):
        found.add("vmdk")
    if "luks" in found and head[6:8] == b"\0\2":
        report_facts.add("luks2")
    tail = view.tail if view.total is not None else b""
    if b"conectix" in {tail[-512:-504], tail[-511:-503]} and len(tail) >= 511:
        if "vhd" not in found:
            report_facts.add("vhd-fixed")
        found.add("vhd")
    elif b"conectix" in tail:
        report_facts.add("vhd-buried")
    if tail[-512:-508] == b"koly" and tail[-508:-504] == b"\0\0\0\4":
        found.add("dmg")
    found |= _optical(head)
    if b"EFI PART" in {head[512:520], head[4096:4104]}:
        found.add("gpt")
    found |= _boot_files(head) | _filesystems(view, head)
    if not found & {"kernel", "fat", "ntfs", "exfat"} and is_mbr(head):
        found.add("mbr")
    if guess_tar(head[:512]):
        found.add("tar")
    packed = compression(head)
    if packed is not None:
        found.add(packed)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<" and b"Envelope" in head[:65536]:
        found.add("ovf")
    return found
