"""Reading an image: resumed where it broke, pinned to one version, verified at its end."""

from __future__ import annotations

import contextlib
import io
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self, cast

from imagestore._digest import Digests, check_expected, compare
from imagestore._models import MIB, Location, Progress, Stat
from imagestore._pool import Engine
from imagestore._record import Record, canceller, quiet
from imagestore._retry import Backoff, Caller
from imagestore._source import zeros
from imagestore.driver import Reading, Verbs
from imagestore.errors import (
    Cancelled,
    Changed,
    InvalidLocation,
    InvalidRequest,
    NotFound,
    SizeMismatch,
    StoreError,
    Unavailable,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["FailoverReader", "ImageReader", "ResumingReader", "check_range", "open_image"]

HOLE_MIN: Final = MIB
"""Holes smaller than this are read like data: asking anew would cost more than their zeros."""


class ResumingReader:
    """The bytes from ``start`` to ``stop`` of one version of an image, as an iterator of chunks.

    A temporary error, or an end that comes too early, makes it read on from where it is; the count of attempts
    starts anew with every chunk. Holes that the driver knows become shared zeros without being read.
    """

    def __init__(self, caller: Caller, location: Location, backoff: Backoff) -> None:
        self._caller = caller
        self._driver = caller.driver
        self._location = location
        self._backoff = backoff
        self._reading: Reading | None = None
        self._closed = False
        self._chunks = self._run()

    def open(self, start: int, stop: int | None, known: Stat | None = None) -> Stat:
        """Connect, or with ``known`` take that for granted. ``stop`` is cut to the size.

        Raises `InvalidRequest` if ``start`` is past the end.
        """
        if known is None and (start or stop is not None or hasattr(self._driver, "extents")):
            known = self._try("stat", lambda: self._driver.stat(self._location))
        self.stat = known or self._first()
        if start > self.stat.size:
            raise InvalidRequest(f"the range begins at byte {start}, the image has {self.stat.size}")
        self.start = self.position = start
        self.stop = self.stat.size if stop is None else min(stop, self.stat.size)
        return self.stat

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._chunks)

    def close(self) -> None:
        self._closed = True
        reading, self._reading = self._reading, None
        if reading is not None:
            self._caller("read", reading.close, self._location)
        # Whatever the iteration holds goes with it, unless another thread is in it: then that one ends it.
        with contextlib.suppress(ValueError):
            self._chunks.close()

    def _first(self) -> Stat:
        # A whole read needs one request only: its answer tells the size too.
        self._reading = self._try("read", lambda: self._driver.read(self._location, 0, None))
        return self._reading.stat

    def _try(self, operation: str, function: Callable[[], Any]) -> Any:
        while True:
            try:
                return self._caller(operation, function, self._location)
            except StoreError as error:
                self._backoff.failed(error, operation)

    def _run(self) -> Generator[bytes, None, None]:
        try:
            while self.position < self.stop and not self._closed:
                try:
                    for start, stop in self._extents():
                        while self.position < start:
                            yield self._passed(zeros(min(MIB, start - self.position)))
                        yield from self._data(stop)
                    while self.position < self.stop:
                        yield self._passed(zeros(min(MIB, self.stop - self.position)))
                except StoreError as error:
                    self.close_reading()
                    self._backoff.failed(error, "read")
        finally:
            self.close_reading()

    def _passed(self, chunk: bytes) -> bytes:
        self.position += len(chunk)
        self._backoff.progressed()
        return chunk

    def close_reading(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            try:
                self._caller("read", reading.close, self._location)
            except StoreError as error:
                # Closing what failed already may fail again; the error that matters is on its way.
                if not error.temporary:
                    raise

    def _extents(self) -> Iterator[tuple[int, int]]:
        if not hasattr(self._driver, "extents"):
            yield self.position, self.stop
            return
        verbs = cast(Verbs, self._driver)
        areas = self._caller(
            "extents", verbs.extents, self._location, None, self._location, self.position, self.stop, self.stat.version
        )
        first: int | None = None
        last = 0
        while True:
            area = self._caller("extents", lambda: next(areas, None), self._location)
            if first is not None and (area is None or area[0] - last >= HOLE_MIN):
                yield first, last
                first = None
            if area is None:
                return
            first = area[0] if first is None else first
            last = area[1]

    def _data(self, stop: int) -> Iterator[bytes]:
        """The bytes from the position to ``stop``."""
        ranged = self._driver.capabilities.ranged_reads
        if self._reading is None:
            start, end = (self.position, stop) if ranged else (0, None)
            self._reading = self._caller(
                "read", self._driver.read, self._location, None, self._location, start, end, version=self.stat.version
            )
            if self._reading.stat.size != self.stat.size:
                raise Changed(f"the image had {self.stat.size} bytes and has {self._reading.stat.size} now")
        chunks = self._reading.chunks
        skip = 0 if ranged else self.position
        while self.position < stop:
            chunk = self._caller.next("read", chunks, self._location)
            if not chunk:
                raise Unavailable(f"the backend ended after {self.position} of {self.stop} bytes")
            if skip:
                cut = min(skip, len(chunk))
                chunk, skip = chunk[cut:], skip - cut
                if not chunk:
                    continue
            if self.position + len(chunk) > stop:
                if ranged:
                    raise SizeMismatch(f"the backend gave more than it was asked for, up to byte {stop}")
                chunk = chunk[: stop - self.position]
            yield self._passed(chunk)
        if ranged and self._caller.next("read", chunks, self._location):
            raise SizeMismatch(f"the backend gave more than it was asked for, up to byte {stop}")
        self.close_reading()


Opener = Callable[[int, int | None], ResumingReader]


class FailoverReader:
    """The same from the first of several copies that works.

    Any copy will do at first. One that takes over must be of the same size, and after the first byte ``midway`` must
    allow it: then digests must decide whether what was put together is the image.
    """

    def __init__(self, openers: Sequence[Opener], *, midway: bool) -> None:
        self._openers = deque(openers)
        self._midway = midway

    def open(self, start: int, stop: int | None) -> Stat:
        """Connect to the first copy that lets us. Raises the first copy's error if none does."""
        self.start = self.position = start
        self._current = self._connect(start, stop, None, None)
        self.stat = self._current.stat
        self.stop = self._current.stop
        return self.stat

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while True:
            try:
                chunk = next(self._current)
            except Cancelled:
                raise
            except StoreError as error:
                self._current.close_reading()
                if self.position != self.start and not self._midway:
                    raise
                self._current = self._connect(self.position, self.stop, error, self.stat.size)
            else:
                self.position += len(chunk)
                return chunk

    def close(self) -> None:
        self._current.close()

    def _connect(self, start: int, stop: int | None, cause: StoreError | None, size: int | None) -> ResumingReader:
        """The next copy that lets us, and is of ``size`` if that was told already."""
        while self._openers:
            try:
                reader = self._openers.popleft()(start, stop)
            except (Cancelled, InvalidRequest) as error:
                if not isinstance(error, InvalidLocation):
                    raise
                cause = cause or error
                continue
            except StoreError as error:
                cause = cause or error
                continue
            if size is None or reader.stat.size == size:
                return reader
            reader.close()
        raise cause or NotFound("there is no location to read from")


def check_range(start: int, stop: int | None, expected: Mapping[str, str] | None) -> dict[str, str]:
    """The expected digests in lower case. Raises `InvalidRequest` for ranges that make no sense."""
    if start < 0 or (stop is not None and stop < start):
        raise InvalidRequest(f"no such range: {start} to {stop}")
    if expected and (start or stop is not None):
        raise InvalidRequest("expected digests are of a whole image, not of a range")
    return check_expected((), expected)[1]


def open_image(
    reader: ResumingReader | FailoverReader,
    expected: Mapping[str, str],
    engine: Engine,
    progress: Progress | None,
    cancel: threading.Event | None,
    record: Record,
) -> ImageReader:
    """The file object over a reader that is connected."""
    record.started(reader.stop - reader.start)
    return ImageReader(
        reader,
        expected=expected,
        digests=Digests(expected, engine.digest_pool),
        progress=quiet(progress),
        check=canceller(cancel),
        done=record.read,
    )


class ImageReader(io.BufferedIOBase):
    """An image being read: a binary file object that can't seek, an iterator over chunks, a context manager.

    With expected digests, the last read of a whole image raises `DigestMismatch` if they differ: nothing read
    before counts until the end was reached.

    Attributes:
        size: bytes that this reader delivers in all.
        stat: what the backend knows of the image.
    """

    def __init__(
        self,
        reader: ResumingReader | FailoverReader,
        *,
        expected: Mapping[str, str],
        digests: Digests,
        progress: Progress | None,
        check: Callable[[], None],
        done: Callable[[BaseException | None, int], None],
    ) -> None:
        super().__init__()
        self.stat = reader.stat
        self.size = reader.stop - reader.start
        self._reader = reader
        self._expected = expected
        self._digests = digests
        self._hashing = len(digests) > 0
        self._progress = progress
        self._check = check
        self._done: Callable[[BaseException | None, int], None] | None = done
        self._position = 0
        self._chunk = b""
        self._at = 0
        self._ended = False

    def __iter__(self) -> ImageReader:
        return self

    def __next__(self) -> bytes:
        if self._chunk:
            return self.read1()
        if chunk := self._next():
            self._position += len(chunk)
            return chunk
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        """Bytes delivered so far."""
        return self._position

    def read1(self, size: int | None = -1, /) -> bytes:
        """The next chunk as the backend gives it, at most ``size`` bytes (-1: of any length); ``b""`` at the end."""
        if self._at >= len(self._chunk):
            self._chunk, self._at = self._next(), 0
        if size is None or size < 0 or size >= len(self._chunk) - self._at:
            piece = self._chunk[self._at :] if self._at else self._chunk
            self._chunk, self._at = b"", 0
        else:
            piece = self._chunk[self._at : self._at + size]
            self._at += size
        self._position += len(piece)
        return piece

    def read(self, size: int | None = -1, /) -> bytes:
        """``size`` bytes, fewer only at the end; -1 or None: all the rest (the whole image in memory)."""
        if size is None or size < 0:
            return b"".join(self)
        first = self.read1(size)
        if len(first) in (0, size):
            return first
        parts, missing = [first], size - len(first)
        while missing and (part := self.read1(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view) and (part := self.read1(len(view) - filled)):
            view[filled : filled + len(part)] = part
            filled += len(part)
        return filled

    def readinto1(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        part = self.read1(len(view))
        view[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Give up the connection. May be called at any time and more than once."""
        if not self.closed:
            self._finish(None)
        super().close()

    def _next(self) -> bytes:
        if self.closed:
            raise ValueError("read from a closed image")
        if self._ended:
            return b""
        try:
            self._check()
            chunk = next(self._reader, b"")
            if not chunk:
                self._ended = True
                if self._expected:
                    compare(self._expected, self._digests.finish())
                self._finish(None)
            elif self._hashing:
                self._digests.update(chunk, _nothing, self._check)
        except BaseException as error:
            self._ended = True
            self._finish(error)
            raise
        if chunk and self._progress is not None:
            self._progress(self._reader.position - self._reader.start, self.size)
        return chunk

    def _finish(self, error: BaseException | None) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        try:
            self._digests.close()
            self._reader.close()
        finally:
            done(error, self._reader.position - self._reader.start)


def _nothing() -> None:
    return None
