"""What coverage-guided fuzzing feeds: one target for each parser, or for several that share a module.

An input is small: a byte of flags, a length, and the pieces of an image that are not zero. With the first flag the
checksums in the image are put right, so that what is behind them is reached too.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from imagestore.formats import Inspection, Inspector, Policy
from imagestore.formats._crc32c import crc32c
from imagestore.formats._json import JsonError, load

KIB, MIB = 1 << 10, 1 << 20
REPAIR = 1
_PIECE = struct.Struct("<IH")
_QUICK = Policy(max_ratio=20, ratio_from=MIB, max_unpacked=4 * MIB)


@dataclass(frozen=True)
class Target:
    """Declarations to inspect under; samples, by the begin of their names, to start from; the longest image."""

    declared: tuple[tuple[str | None, str | None], ...]
    seeds: tuple[str, ...]
    longest: int = 192 * KIB
    repair: Callable[[bytearray], None] | None = None
    plain: bool = False  # the input is the image
    words: tuple[bytes, ...] = ()


def pack(data: bytes, longest: int, flags: int = REPAIR, most: int = 6 * KIB) -> bytes:
    """An input that makes this image; of one that is too long the middle is left out."""
    if len(data) > longest:
        data = data[: longest - 64 * KIB] + data[-64 * KIB :]
    packed = bytearray(struct.pack("<BI", flags, len(data)))
    start = 0
    while start < len(data) and len(packed) < most:
        if not any(data[start : start + 32]):
            start += 32
            continue
        stop = start
        while stop < min(len(data), start + 1024) and any(data[stop : stop + 32]):
            stop += 32
        piece = data[start:stop].rstrip(b"\0")
        packed += _PIECE.pack(start, len(piece)) + piece
        start = stop
    return bytes(packed)


def unpack(data: bytes, longest: int) -> bytearray:
    """The image; of any input."""
    if len(data) < 5:
        return bytearray(data)
    total = int.from_bytes(data[1:5], "little") % (longest + 1)
    image = bytearray(total)
    place = 5
    while total and place + _PIECE.size <= len(data):
        offset, length = _PIECE.unpack_from(data, place)
        place += _PIECE.size
        offset %= total
        piece = data[place : place + length][: total - offset]
        image[offset : offset + len(piece)] = piece
        place += length
    return image


def _vhd(image: bytearray) -> None:
    for start in {0, max(len(image) - 512, 0)}:
        if image[start : start + 8] == b"conectix" and len(image) >= start + 512:
            _ones(image, start, 512, 64)
            header = int.from_bytes(image[start + 16 : start + 24], "big")
            if header + 1024 <= len(image):
                _ones(image, header, 1024, 36)
    if image[:8] == b"conectix" and len(image) > 2048:
        image[-512:] = image[:512]


def _ones(image: bytearray, start: int, length: int, field: int) -> None:
    image[start + field : start + field + 4] = bytes(4)
    image[start + field : start + field + 4] = struct.pack(">I", ~sum(image[start : start + length]) & 0xFFFFFFFF)


def _vhdx(image: bytearray) -> None:
    if len(image) < 327680:
        return
    image[262144:327680] = image[196608:262144]
    for start, length in ((65536, 4096), (131072, 4096), (196608, 65536), (262144, 65536)):
        image[start + 4 : start + 8] = bytes(4)
        image[start + 4 : start + 8] = struct.pack("<I", crc32c(bytes(image[start : start + length])))


def _gpt(image: bytearray) -> None:
    sector = 4096 if image[4096:4104] == b"EFI PART" else 512
    alternate = int.from_bytes(image[sector + 32 : sector + 40], "little") * sector
    for start in (sector, alternate):
        if len(image) < start + sector:
            continue
        lba, count, entry = struct.unpack_from("<QII", image, start + 72)
        table = image[lba * sector :][: count * entry] if count * entry <= MIB and lba < 2**32 else b""
        struct.pack_into("<I", image, start + 88, zlib.crc32(table))
        size = min(int.from_bytes(image[start + 12 : start + 16], "little"), sector)
        image[start + 16 : start + 20] = bytes(4)
        struct.pack_into("<I", image, start + 16, zlib.crc32(image[start : start + size]))


def _luks(image: bytearray) -> None:
    size = int.from_bytes(image[8:16], "big")
    if image[6:8] == b"\0\2" and 4096 < size <= len(image):
        name = image[72:104].rstrip(b"\0").decode("latin-1")
        image[448:512] = bytes(64)
        if name in {"sha1", "sha256", "sha512"}:
            digest = hashlib.new(name, image[:size]).digest()
            image[448 : 448 + len(digest)] = digest


def _tar(image: bytearray) -> None:
    start = 0
    while start + 512 <= len(image):
        block = image[start : start + 512]
        if not any(block):
            break
        image[start + 148 : start + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
        text = bytes(block[124:135]).strip(b" \0")
        size = int(text, 8) if text.isdigit() and not set(text) & set(b"89") else 0
        start += 512 + -(-size // 512) * 512


TARGETS: dict[str, Target] = {
    "qcow2": Target(
        (("qcow2", None), ("raw", None)), ("good/qcow", "good/qed", "hostile/e", "hostile/q"),
    ),
    "vmdk": Target((("vmdk", None), (None, None)), ("good/vmdk", "hostile/m"), words=(b"parentCID=", b'createType="')),
    "vhdx": Target((("vhdx", None),), ("good/vhdx", "hostile/x"), 4 * MIB, _vhdx),
    "vhd": Target((("vhd", None), ("raw", None)), ("good/vhd-", "hostile/v"), repair=_vhd),
    "iso": Target((("iso", None), ("raw", None)), ("good/iso", "good/ipxe.iso", "good/udf", "hostile/i")),
    "ova": Target(
        (("vmdk", "ova"), (None, None)), ("good/ova", "hostile/o"), repair=_tar,
        words=(b"SHA256(", b"ustar\x0000", b'ovf:href="', b".000000000"),
    ),
    "docker": Target(
        (("raw", "docker"), (None, None)), ("good/docker", "good/oci", "hostile/k"), repair=_tar,
        words=(b"oci-layout", b"manifest.json", b"blobs/sha256/", b"GNU.sparse.", b'"mediaType":', b'"layers":['),
    ),
    "ovf": Target(
        (("vmdk", "ovf"),), ("good/ovf",), 32 * KIB, plain=True,
        words=(b'xmlns:a="', b"<!DOCTYPE", b"byte * 2^30", b"<Disk ", b"<File ", b"encoding="),
    ),
    "json": Target((), (), 16 * KIB, plain=True, words=(b'{"a":', b'"\\"', b"1e999", b"[[", b"NaN")),
    "luks": Target((("luks", None), ("raw", None)), ("good/luks", "hostile/l"), repair=_luks),
    "gpt": Target((("gpt", None), ("raw", None)), ("good/raw-gpt", "good/raw-mbr", "hostile/g"), repair=_gpt),
    "compressed": Target(
        (("raw", "compressed"), (None, None)), ("good/compressed", "hostile/z", "good/initrd"), 8 * KIB, plain=True,
        words=(b"PK\3\4", b"PK\1\2", b"PK\5\6", b"BZh91AY&SY", b"\xfd7zXZ\0", b"\x1f\x8b\x08"),
    ),
    "filesystems": Target(
        (("raw", None), ("ami", None), (None, None)), ("good/ext", "good/fat", "good/ntfs", "good/raw", "hostile/r"),
        words=(b"hsqs", b"XFSB", b"LABELONE", b"SWAPSPACE2", b"version=1\n", b"createType="),
    ),
    "kernels": Target(
        (("aki", None), ("ari", None)),
        ("good/Image", "good/memtest", "good/initrd", "good/ipxe.lkrn", "good/uImage", "good/vmlinu"),
        words=(b"HdrS", b"070701", b"PE\0\0", b"zimg", b"ARM\x64"),
    ),
    "vdi": Target((("vdi", None), ("ploop", None)), ("good/vdi", "good/parallels", "hostile/d", "hostile/p")),
}  # fmt: skip


def image(name: str, data: bytes) -> bytes:
    """The image that an input stands for."""
    target = TARGETS[name]
    if target.plain:
        return data[: target.longest]
    whole = unpack(data, target.longest)
    if target.repair is not None and data and data[0] & REPAIR:
        target.repair(whole)
    return bytes(whole)


def _inspect(data: bytes, disk: str | None, container: str | None, step: int) -> Inspection:
    inspector = Inspector(disk_format=disk, container_format=container, policy=_QUICK)
    for start in range(0, len(data), step):
        inspector.feed(data[start : start + step])
    result = inspector.finish()
    assert (inspector.refusal is None) == result.accepted
    return result


def run(name: str, data: bytes) -> None:
    """Inspect the image of an input, whole and in pieces. Raises AssertionError for what must not be."""
    if name == "json":
        with contextlib.suppress(JsonError):
            load(data)
        return
    whole = image(name, data)
    for disk, container in TARGETS[name].declared:
        found = _inspect(whole, disk, container, len(whole) or 1)
        assert not any(each.code == "parser.failed" for each in found.findings), found.findings
        if len(data) % 4 == 0:
            assert _inspect(whole, disk, container, 5000 + len(data)) == found
