"""What looking at an image costs: a stream in 64 KiB and 1 MiB chunks, beside sha256 and oslo.utils' InspectWrapper.

    python tests/bench/formats.py [--mib 1024] [--rounds 3] [--formats qcow2,raw,...]

The three take turns, and the best time of each counts. Each stream is a head that is made here, then data; targets:
at most 3 % of sha256's time at 1 MiB, at least ten times as fast as oslo at 64 KiB. What must hash every byte (OVA,
container images) is compared with its digests alone, what is unpacked with its decompressor alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from imagestore.formats import Inspector

MIB = 1 << 20
NOISE = os.urandom(16 * MIB)


def cut(head: bytes, total: int, chunk: int, tail: bytes = b"") -> list[bytes]:
    """The stream's chunks; those of the body are the same few objects, so that memory stays small."""
    body = [NOISE[start : start + chunk] for start in range(0, len(NOISE), chunk)]
    chunks = [head[start : start + chunk].ljust(chunk, b"\0") for start in range(0, len(head), chunk)]
    count = total // chunk
    chunks += [body[index % len(body)] for index in range(count - len(chunks))]
    if tail:
        chunks[-1] = chunks[-1][: chunk - len(tail)] + tail
    return chunks


def made(format: str, *options: str) -> bytes:
    """The first 4 MiB of what qemu-img makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        command = ["qemu-img", "create", "-q", "-f", format, *options, str(path), "64M"]
        subprocess.run(command, check=True)
        return path.read_bytes()[: 4 * MIB]


def iso() -> bytes:
    head = bytearray(64 * 1024)
    volume = struct.pack("<I", 64) + struct.pack(">I", 64)
    head[32768:32775] = b"\1CD001\1"
    head[32768 + 80 : 32768 + 88] = volume
    head[32768 + 128 : 32768 + 132] = b"\0\x08\x08\0"
    head[34816:34823] = b"\xffCD001\1"
    return bytes(head)


def gpt() -> bytes:
    table = bytes(128 * 128)
    header = bytearray(struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, 1, 8191, 34, 8158,
                                   b"x" * 16, 2, 128, 128, zlib.crc32(table)))  # fmt: skip
    header[16:20] = struct.pack("<I", zlib.crc32(bytes(header)))
    mbr = bytearray(512)
    mbr[446:462] = struct.pack("<B3xB3xII", 0, 0xEE, 1, 0xFFFFFFFF)
    mbr[510:] = b"\x55\xaa"
    return bytes(mbr) + bytes(header).ljust(512, b"\0") + table


def ova(total: int, chunk: int) -> list[bytes]:
    vmdk = made("vmdk", "-o", "subformat=streamOptimized")[: 64 * 1024]
    size = total - 64 * 1024
    ovf = (
        '<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" '
        'xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References>'
        f'<File ovf:id="f" ovf:href="d.vmdk" ovf:size="{size}"/></References><DiskSection>'
        '<Disk ovf:diskId="d" ovf:fileRef="f" ovf:capacity="67108864"/></DiskSection></Envelope>'
    ).encode()
    manifest = f"SHA256(v.ovf)= {hashlib.sha256(ovf).hexdigest()}\nSHA256(d.vmdk)= {'0' * 64}\n".encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in (("v.ovf", ovf), ("v.mf", manifest)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("d.vmdk")
        info.size = size
        head = buffer.getvalue() + info.tobuf(tarfile.USTAR_FORMAT) + vmdk
    return cut(head, total, chunk, bytes(1024))


def docker(total: int, chunk: int) -> list[bytes]:
    info = tarfile.TarInfo("blobs/sha256/" + "0" * 64)
    info.size = total - 4096
    return cut(info.tobuf(tarfile.USTAR_FORMAT), total, chunk, bytes(1024))


def packed(total: int, chunk: int) -> list[bytes]:
    """gzip of data that shrinks by half, as system images do."""
    unit = b"".join(NOISE[start : start + 512] + bytes(512) for start in range(0, 4 * MIB, 512))
    member = gzip.compress(unit, 6)
    data = member * max(total // len(unit), 1)
    return [data[start : start + chunk] for start in range(0, len(data), chunk)]


Feed = Callable[[list[bytes]], None]


def ours(disk: str, container: str) -> Feed:
    def feed(chunks: list[bytes]) -> None:
        inspector = Inspector(disk_format=disk, container_format=container)
        for chunk in chunks:
            inspector.feed(chunk)
        inspector.finish()

    return feed


def sha256(chunks: list[bytes]) -> None:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)


def unpack(chunks: list[bytes]) -> None:
    """The decompressor alone, and the least around it."""
    decoder = zlib.decompressobj(31)
    for chunk in chunks:
        data = chunk
        while data:
            decoder.decompress(data)
            data = decoder.unused_data
            if data:
                decoder = zlib.decompressobj(31)


def oslo() -> Feed | None:
    try:
        from oslo_utils.imageutils import format_inspector
    except ImportError:
        return None

    class Source(io.RawIOBase):
        def __init__(self, chunks: list[bytes]) -> None:
            self._chunks: Iterator[bytes] = iter(chunks)

        def read(self, size: int = -1) -> bytes:
            return next(self._chunks, b"")

    def feed(chunks: list[bytes]) -> None:
        wrapper = format_inspector.InspectWrapper(Source(chunks))
        while wrapper.read(len(chunks[0])):
            pass
        wrapper.close()

    return feed


def clock(feed: Feed, chunks: list[bytes]) -> float:
    began = time.process_time()
    feed(chunks)
    return time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", default="")
    chosen = parser.parse_args()
    total = chosen.mib * MIB
    streams: dict[str, tuple[str, str, Callable[[int], list[bytes]]]] = {
        "raw": ("raw", "bare", lambda chunk: cut(b"", total, chunk)),
        "gpt": ("gpt", "bare", lambda chunk: cut(gpt(), total, chunk)),
        "iso": ("iso", "bare", lambda chunk: cut(iso(), total, chunk)),
        "qcow2": ("qcow2", "bare", lambda chunk: cut(made("qcow2"), total, chunk)),
        "vmdk": ("vmdk", "bare", lambda chunk: cut(made("vmdk"), total, chunk)),
        "vdi": ("vdi", "bare", lambda chunk: cut(made("vdi"), total, chunk)),
        "vhd": ("vhd", "bare", lambda chunk: cut(made("vpc")[: 2 * MIB], total, chunk, made("vpc")[:512])),
        "vhdx": ("vhdx", "bare", lambda chunk: cut(made("vhdx"), total, chunk)),
        "ploop": ("ploop", "bare", lambda chunk: cut(made("parallels")[:MIB], total, chunk)),
        "ova": ("vmdk", "ova", lambda chunk: ova(total, chunk)),
        "docker": ("raw", "docker", lambda chunk: docker(total, chunk)),
        "gzip": ("raw", "compressed", lambda chunk: packed(total // 4, chunk)),
    }
    wanted = [name for name in chosen.formats.split(",") if name] or list(streams)
    other = oslo()
    print(f"{chosen.mib} MiB a stream, best of {chosen.rounds}, CPU seconds")
    print(f"{'format':8} {'chunk':>8} {'ours':>8} {'sha256':>8} {'oslo':>8} {'/sha256':>8} {'oslo/':>8}  note")
    for name in wanted:
        disk, container, make = streams[name]
        baseline: Feed = unpack if name == "gzip" else sha256
        for chunk in (64 * 1024, MIB):
            chunks = make(chunk)
            feeds = {"ours": ours(disk, container), "base": baseline} | ({"oslo": other} if other else {})
            best = dict.fromkeys(feeds, float("inf"))
            for _ in range(chosen.rounds):
                for key, feed in feeds.items():
                    best[key] = min(best[key], clock(feed, chunks))
            tracemalloc.start()
            feeds["ours"](chunks[: max(64, 64 * MIB // chunk)])
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            other_time = best.get("oslo", float("nan"))
            note = f"{'its decompressor is the base; ' if name == 'gzip' else ''}peak {peak / MIB:.1f} MiB"
            print(
                f"{name:8} {chunk // 1024:5} KiB {best['ours']:8.4f} {best['base']:8.4f} {other_time:8.4f} "
                f"{best['ours'] / best['base']:8.2%} {other_time / best['ours']:7.1f}x  {note}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
