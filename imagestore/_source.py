"""Where an image comes from: a path, a file object, an iterable or bytes, made alike.

A `Source` gives whole blocks. Whatever its stream raises is a `SourceError`: the caller's fault, not the store's.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Final, Protocol, TypeAlias, cast

from imagestore.errors import Cancelled, InvalidRequest, SourceError, StoreError

__all__ = ["Readable", "Source", "SourceType", "open_source", "zeros"]

PEEK: Final = 64 * 1024
READ_MAX: Final = 128 * 1024


class Readable(Protocol):
    """A stream: ``read(n)`` gives up to n bytes, and ``b""`` at the end."""

    def read(self, size: int, /) -> bytes: ...


SourceType: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Readable | Iterable[bytes]"

Memory: TypeAlias = Callable[[int], io.BytesIO]
"""Gives a buffer of so many bytes, which is filled and read out without a copy."""


@functools.lru_cache(16)
def zeros(size: int) -> bytes:
    """``size`` zero bytes, shared by all who ask for as many lately: they are the same few lengths all the time."""
    return bytes(size)


def _filled(length: int, memory: Memory | None, fill: Callable[[memoryview, int], int]) -> bytes:
    """A block filled piece by piece; shorter if the pieces end."""
    buffer = io.BytesIO(bytes(length)) if memory is None else memory(length)
    filled = 0
    with buffer.getbuffer() as view:
        while filled < length:
            with view[filled:] as rest:
                count = fill(rest, filled)
            if not count:
                break
            filled += count
    buffer.truncate(filled)
    return buffer.getvalue()


class Source(ABC):
    """A stream of known or unknown size.

    Attributes:
        size: bytes in all, if the source knows it.
    """

    size: int | None = None

    @abstractmethod
    def block(self, length: int, memory: Memory | None = None) -> bytes:
        """The next ``length`` bytes, fewer only at the end, ``b""`` after it; in what ``memory`` gives."""

    @abstractmethod
    def ended(self) -> bool:
        """Is there nothing more? May read a little ahead."""

    def close(self) -> None:  # noqa: B027 - most sources have nothing to give up
        """Give up what `open_source` opened."""


class _FileSource(Source):
    """A regular file or a block device, read at offsets; holes of a sparse file are not read at all."""

    def __init__(self, fd: int, position: int, size: int, owner: BinaryIO, *, owned: bool, sparse: bool) -> None:
        self.size = size - position
        self._fd = fd
        self._position = position
        self._end = size
        self._owner = owner
        self._owned = owned
        self._sparse = sparse
        self._data_from = position if not sparse else -1
        self._hole_until = -1
        self._raw_position = 0 if owned else os.lseek(fd, 0, os.SEEK_CUR)

    def block(self, length: int, memory: Memory | None = None) -> bytes:
        length = min(length, self._end - self._position)
        if length <= 0:
            return b""
        with _source_errors():
            data = zeros(length) if self._sparse and self._hole(length) else _filled(length, memory, self._fill)
        self._position += len(data)
        return data

    def _fill(self, view: memoryview, filled: int) -> int:
        return os.preadv(self._fd, [view], self._position + filled)

    def _hole(self, length: int) -> bool:
        if self._position + length <= self._hole_until:
            return True
        if self._position < self._data_from:
            return self._position + length <= self._data_from
        try:
            self._data_from = os.lseek(self._fd, self._position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                self._data_from = self._end
            else:
                self._sparse = False
                return False
        if self._data_from > self._position:
            self._hole_until = self._data_from
            return self._position + length <= self._hole_until
        self._data_from = self._position
        return False

    def ended(self) -> bool:
        with _source_errors():
            return self._position >= self._end and not os.pread(self._fd, 1, self._position)

    def close(self) -> None:
        if self._owned:
            self._owner.close()
        else:
            # The caller's file object knows nothing of this. First put the descriptor back to where it believes it
            # to be (looking for holes moved it), then leave it where a plain read would have.
            with contextlib.suppress(OSError, ValueError):
                os.lseek(self._fd, self._raw_position, os.SEEK_SET)
                self._owner.seek(self._position)


class _PieceSource(Source):
    """Anything that comes in pieces of its own lengths."""

    def __init__(self, pieces: Iterator[bytes], close: contextlib.AbstractContextManager[object] | None = None) -> None:
        self._pieces = pieces
        self._rest: bytes | memoryview = b""
        self._close = close
        self._wanted = 0

    def block(self, length: int, memory: Memory | None = None) -> bytes:
        if not self._rest:
            self._rest = self._next(length)
        # A piece that is just what is wanted needs no copy.
        if not self._rest or (isinstance(self._rest, bytes) and len(self._rest) == length):
            whole, self._rest = bytes(self._rest), b""
            return whole
        return _filled(length, memory, self._fill)

    def _fill(self, view: memoryview, filled: int) -> int:
        piece = self._rest or self._next(len(view))
        size = min(len(piece), len(view))
        view[:size] = piece[:size] if size < len(piece) else piece
        self._rest = memoryview(piece)[size:] if size < len(piece) else b""
        return size

    def ended(self) -> bool:
        if not self._rest:
            self._rest = self._next(PEEK)
        return not self._rest

    def close(self) -> None:
        if self._close is not None:
            self._close.__exit__(None, None, None)

    def _next(self, length: int) -> bytes:
        self._wanted = length
        with _source_errors():
            for piece in self._pieces:
                if data := _as_bytes(piece):
                    return data
        return b""


class _ReadSource(_PieceSource):
    """A file object."""

    def __init__(self, stream: Readable, close: contextlib.AbstractContextManager[object] | None = None) -> None:
        super().__init__(iter(self._read, b""), close)
        self._stream = stream

    def _read(self) -> bytes:
        data = self._stream.read(min(self._wanted, READ_MAX))
        if cast(object, data) is None:
            raise SourceError("the source is in non-blocking mode and has no data: give one that blocks")
        return data


def _as_bytes(piece: object) -> bytes:
    if isinstance(piece, bytes):
        return piece
    if isinstance(piece, (bytearray, memoryview)):
        return bytes(piece)
    hint = " (opened in text mode?)" if isinstance(piece, str) else ""
    raise SourceError(f"the source gave {type(piece).__name__} instead of bytes{hint}")


@contextlib.contextmanager
def _source_errors() -> Iterator[None]:
    try:
        yield
    except (SourceError, Cancelled):
        raise
    except Exception as error:
        temporary = isinstance(error, StoreError) and error.temporary
        raise SourceError(f"the source failed with {type(error).__name__}: {error}", temporary=temporary) from error


def open_source(source: SourceType) -> Source:
    """Make a `Source` of what a caller gave. Raises `SourceError` or `InvalidRequest`."""
    if isinstance(source, (str, os.PathLike)):
        with _source_errors():
            return _from_file(open(source, "rb", buffering=0), owned=True)
    if isinstance(source, (bytes, bytearray, memoryview)):
        stream = io.BytesIO(source)
        found: Source = _ReadSource(stream)
        found.size = stream.getbuffer().nbytes
        return found
    # Only these two exactly: a subclass may have its own idea of reading.
    if type(source) in (io.FileIO, io.BufferedReader):
        with _source_errors():
            return _from_file(source, owned=False)
    if callable(getattr(source, "read", None)):
        if isinstance(cast(object, source), io.TextIOBase):
            raise InvalidRequest("the source is a text file: open it in binary mode")
        return _ReadSource(source)  # type: ignore[arg-type]  # has read; what it gives is checked piece by piece
    if isinstance(source, Iterable):
        return _PieceSource(iter(source))
    if hasattr(source, "__aiter__"):
        raise InvalidRequest("the source is asynchronous: wrap it with imagestore.aio.source")
    raise InvalidRequest(
        f"can't read an image from {type(source).__name__}: give a path, a binary file object or an iterable of bytes"
    )


def _from_file(file: Any, *, owned: bool) -> Source:
    try:
        fd = file.fileno()
        mode = os.fstat(fd).st_mode
        position = 0 if owned else (file.tell() if file.seekable() else 0)
        if stat.S_ISREG(mode):
            return _FileSource(fd, position, max(position, os.fstat(fd).st_size), file, owned=owned, sparse=True)
        if stat.S_ISBLK(mode):
            end = os.lseek(fd, 0, os.SEEK_END)
            return _FileSource(fd, position, end, file, owned=owned, sparse=False)
        return _ReadSource(file, contextlib.closing(file) if owned else None)
    except BaseException:
        if owned:
            file.close()
        raise
