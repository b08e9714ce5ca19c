"""Unpacking in passing, within limits: gzip (RFC 1952), bzip2, xz, lzma, zip with one entry, zstd (RFC 8878)."""

from __future__ import annotations

import bz2
import importlib
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any, Final, Protocol

from imagestore.formats._findings import Report
from imagestore.formats._policy import Policy

__all__ = ["Unpacker"]

# Fixed pieces, so that what a decompressor sees, and so every verdict, does not depend on how the stream was cut.
_PIECE: Final = 32 << 10
_OUTPUT: Final = 256 << 10
_WINDOW_LOG: Final = 27
_HEAD: Final = 1 << 20
_DIRECTORY: Final = 64 << 10
# A new decoder for each few bytes costs more than what it unpacks.
_MEMBERS: Final = 1000
_MEMBER: Final = 256


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


class _Deflate:
    """zlib's decompressor with the manners of the others."""

    def __init__(self, bits: int) -> None:
        self._inner = zlib.decompressobj(bits)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail and not self._full

    def decompress(self, data: bytes, max_length: int = 0) -> bytes:
        result = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self._full = len(result) == max_length
        return result


def _zstd() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _decoder(kind: str, memory: int) -> Callable[[], _Decoder] | None:
    """A maker of decoders; None where we have none."""
    if kind == "gzip":
        return lambda: _Deflate(31)
    if kind == "bzip2":
        return bz2.BZ2Decompressor
    if kind == "xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memory)
    if kind == "lzma":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memory)
    if kind == "zip":
        return lambda: _Deflate(-15)
    if kind == "zstd":
        module = _zstd()
        if module is not None:
            parameter = module.DecompressionParameter.window_log_max
            decoder: Callable[[], _Decoder] = lambda: module.ZstdDecompressor(options={parameter: _WINDOW_LOG})  # noqa: E731 - as the others
            return decoder
    return None


class Unpacker:
    """Takes compressed data; gives what it unpacks to, in order, to `output`.

    Attributes:
        opaque: nothing of the contents was looked at.
        partial: only the begin of the contents was looked at.
        dead: it was given up; a finding says why.
    """

    def __init__(self, kind: str, policy: Policy, output: Callable[[bytes], None], report: Report) -> None:
        self._kind = kind
        self._policy = policy
        self._output = output
        self._report = report
        self._make = None if policy.compressed == "opaque" else _decoder(kind, policy.unpack_memory)
        self._decoder: _Decoder | None = None
        self._pending = bytearray()
        self._rest = bytearray()
        self._zip: _Zip | None = _Zip() if kind == "zip" else None
        self._begun = False
        self._taken = 0
        self._members = 0
        self.unpacked = 0
        self.dead = False
        self.partial = False
        self.opaque = self._make is None

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if self._stopped() or (self.opaque and self._begun):
            return
        if self._pending or len(chunk) < _PIECE:
            missing = _PIECE - len(self._pending)
            self._pending += chunk[:missing]
            if len(self._pending) < _PIECE:
                return
            self._piece(bytes(self._pending))
            self._pending.clear()
            chunk = chunk[missing:]
        whole = len(chunk) - len(chunk) % _PIECE
        for start in range(0, whole, _PIECE):
            if self._stopped():
                return
            self._piece(chunk[start : start + _PIECE])
        self._pending += chunk[whole:]

    def finish(self) -> None:
        """The compressed data has ended."""
        if self._pending or not self._begun:
            self._piece(bytes(self._pending))
            self._pending.clear()
        if self.opaque:
            self._report("compressed.opaque", f"{self._kind} was not unpacked")
        if self._stopped() or self.opaque:
            return
        if self._zip is not None and self._zip.state == "directory":
            self._directory(self._zip)
        elif self._decoder is not None or self._zip is not None or not self._members:
            self._give_up("compressed.truncated", "the end is missing")

    def _stopped(self) -> bool:
        return self.dead or self.partial

    def _give_up(self, code: str, message: str) -> None:
        if not self.dead:
            self._report(code, message)
        self.dead = True

    def _piece(self, data: bytes) -> None:
        if self._stopped():
            return
        self._taken += len(data)
        if not self._begun:
            self._begun = True
            if self._kind == "zstd" and _zstd_window(data) > _WINDOW_LOG:
                self._give_up("compressed.memory", f"the window is above 2^{_WINDOW_LOG} bytes")
                return
            if self._zip is not None and not self.opaque:
                error = self._zip.begin(data)
                if error == "opaque":
                    self.opaque = True
                    return
                if error:
                    self._give_up("compressed.corrupt", error)
                    return
                data = data[self._zip.start :]
        if self.opaque:
            return
        try:
            self._unpack(data)
        except (zlib.error, OSError, lzma.LZMAError, EOFError) as error:
            if "emory" in str(error):
                self._give_up("compressed.memory", "unpacking needs more memory than allowed")
            else:
                self._give_up("compressed.corrupt", "it can't be unpacked")
        except MemoryError:
            self._give_up("compressed.memory", "unpacking needs more memory than allowed")
        except Exception as error:  # noqa: BLE001 - an optional decoder has errors of its own
            self._give_up("compressed.corrupt", f"it can't be unpacked: {type(error).__name__}")

    def _unpack(self, data: bytes) -> None:
        while data and not self._stopped():
            if self._zip is not None and self._zip.state == "directory":
                self._rest += data
                if len(self._rest) > _DIRECTORY:
                    self._give_up("compressed.trailing", "more than one entry, or data behind it")
                return
            if self._zip is not None and self._zip.stored is not None:
                part = data[: self._zip.stored]
                self._zip.stored -= len(part)
                self._emit(part)
                data = data[len(part) :]
                if not self._zip.stored:
                    self._zip.state = "directory"
                continue
            if self._decoder is None:
                if self._members and not self._another(data):
                    return
                assert self._make is not None
                self._decoder = self._make()
            self._emit(self._decoder.decompress(data, _OUTPUT))
            while not self._decoder.eof and not self._decoder.needs_input and not self._stopped():
                self._emit(self._decoder.decompress(b"", _OUTPUT))
            data = b""
            if self._decoder.eof:
                data = self._decoder.unused_data
                self._decoder = None
                self._members += 1
                if self._members > _MEMBERS and self.unpacked < self._members * _MEMBER:
                    self._give_up("compressed.bomb", "it is thousands of streams that hold next to nothing")
                if self._zip is not None:
                    self._zip.state = "directory"

    def _another(self, data: bytes) -> bool:
        """Whether what follows the end is one more stream of the same kind, which these formats allow."""
        signs = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd"}
        sign = signs.get(self._kind)
        if sign is not None and (data.startswith(sign) or sign.startswith(data[: len(sign)])):
            return True
        if self._kind == "zstd" and data[1:4] == b"\x2a\x4d\x18":
            return True
        if self._kind != "xz" or any(data):
            self._give_up("compressed.trailing", "data follows the end of the compressed stream")
        return False

    def _emit(self, data: bytes) -> None:
        if not data:
            return
        self.unpacked += len(data)
        if self._zip is not None:
            self._zip.crc = zlib.crc32(data, self._zip.crc)
        limit = self._policy.max_ratio * self._taken
        if self.unpacked > self._policy.max_unpacked or self.unpacked > max(limit, self._policy.ratio_from):
            self._give_up("compressed.bomb", "it unpacks to more than the limits allow")
            return
        if self._policy.compressed == "head" and self.unpacked >= _HEAD:
            self.partial = True
            data = data[: len(data) - (self.unpacked - _HEAD)]
        self._output(data)

    def _directory(self, entry: _Zip) -> None:
        error = entry.end(bytes(self._rest), self.unpacked)
        if error:
            self._give_up(error, "more than one entry, or what describes it is damaged")


class _Zip:
    """The one entry of a zip file (PKWARE APPNOTE.TXT)."""

    def __init__(self) -> None:
        self.state = "entry"
        self.start = 0
        self.stored: int | None = None
        self.crc = 0
        self._name = b""

    def begin(self, data: bytes) -> str | None:
        """Read the local header. Returns what is wrong, or ``"opaque"`` if we can't unpack it."""
        if len(data) < 30 or data[:4] != b"PK\3\4":
            return "the local header is missing"
        flags, method, size, name, extra = struct.unpack_from("<6xHH8xI4xHH", data)
        self.start = 30 + name + extra
        self._name = data[30 : 30 + name]
        if flags & 0x2041 or method not in {0, 8} or (method == 0 and (flags & 8 or size == 0xFFFF_FFFF)):
            return "opaque"
        if self.start > len(data):
            return "the local header is too long"
        if method == 0:
            self.stored = size
            if not size:
                self.state = "directory"
        return None

    def end(self, rest: bytes, size: int) -> str | None:
        """Check what follows the data: at most a descriptor, then a directory of exactly this entry."""
        directory = rest.find(b"PK\1\2")
        if directory > 24:
            return "compressed.trailing"
        if directory < 0 or len(rest) < directory + 46:
            return "compressed.truncated"
        crc, _, unpacked, name, extra, comment = struct.unpack_from("<16xIIIHHH", rest, directory)
        (local,) = struct.unpack_from("<I", rest, directory + 42)
        if crc != self.crc or (unpacked not in {size, 0xFFFF_FFFF}) or local:
            return "compressed.corrupt"
        if rest[directory + 46 : directory + 46 + name] != self._name:
            return "compressed.corrupt"
        end = rest.find(b"PK\5\6", directory + 46 + name + extra + comment)
        if end < 0 or len(rest) < end + 22:
            return "compressed.truncated"
        count, note = struct.unpack_from("<10xH8xH", rest, end)
        between = rest[directory + 46 + name + extra + comment : end]
        if count != 1 or len(rest) != end + 22 + note or not (between == b"" or between.startswith(b"PK\6\6")):
            return "compressed.trailing"
        return None


def _zstd_window(data: bytes) -> int:
    """The binary logarithm of the window in the first frame's header; 0 where the frame has none."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 6:
        return 0
    descriptor = data[4]
    if not descriptor & 0x20:
        return 10 + (data[5] >> 3)
    field = (1, 2, 4, 8)[descriptor >> 6]
    start = 5 + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(data[start : start + field], "little").bit_length() - 1
