"""Image contents and sources for the checks: cheap to make, and different at every offset."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Final

__all__ = ["CountingSource", "chunks", "pattern", "pipe_of"]

_UNIT: Final = 4096


def pattern(size: int, seed: int | str = 0) -> bytes:
    """``size`` bytes without runs of zeros, where no two units of 4 KiB are alike."""
    unit = bytes(byte or 1 for byte in random.Random(seed).randbytes(min(size, 16 * _UNIT)))  # noqa: S311 - test data
    if len(unit) < 16 * _UNIT:
        return unit
    parts = []
    for number in range(-(-size // _UNIT)):
        place = number % 16 * _UNIT
        parts.append(b"%015d|" % number)
        parts.append(unit[place + 16 : place + _UNIT])
    return b"".join(parts)[:size]


def chunks(data: bytes, length: int = 60_000) -> Iterator[bytes]:
    """``data`` in pieces that fit no block."""
    for start in range(0, len(data), length):
        yield data[start : start + length]


class CountingSource:
    """A file object of unknown size that knows how much was read of it, and calls ``at`` at given offsets."""

    def __init__(self, data: bytes, at: dict[int, Callable[[], object]] | None = None) -> None:
        self._data = data
        self._at = sorted((at or {}).items(), key=lambda item: item[0])
        self.taken = 0

    def read(self, size: int = -1, /) -> bytes:
        while self._at and self.taken >= self._at[0][0]:
            self._at.pop(0)[1]()
        stop = len(self._data) if size < 0 else self.taken + size
        if self._at:
            stop = min(stop, self._at[0][0])
        part = self._data[self.taken : stop]
        self.taken += len(part)
        return part


@contextlib.contextmanager
def pipe_of(data: bytes) -> Iterator[int]:
    """The reading end of a pipe through which ``data`` comes."""
    reader, writer = os.pipe()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), open(writer, "wb", buffering=0) as file:
            for piece in chunks(data, 10_007):
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    try:
        yield reader
    finally:
        os.close(reader)
        thread.join(10)
