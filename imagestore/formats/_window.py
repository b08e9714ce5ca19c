"""What is remembered of a stream that passes once: its head, its tail, and a few ranges that somebody wants."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["HEAD", "TAIL", "View", "Window"]

HEAD: Final = 1 << 20
TAIL: Final = 64 << 10
WANTED: Final = 12
WANTED_BYTES: Final = 4 << 20


@dataclass(slots=True)
class View:
    """The remembered bytes at one moment. `total` and `tail` are known only when the stream has ended."""

    head: bytes
    tail: bytes = b""
    total: int | None = None
    ranges: dict[int, bytes] = field(default_factory=dict)
    wanted: list[tuple[int, int]] = field(default_factory=list)

    def at(self, offset: int, length: int) -> bytes | None:
        """`length` bytes at `offset`, or None: then they are behind the end, gone, or still to come.

        Before the end, what is still to come is captured when it passes, and the parser is called again.
        """
        if offset < 0 or (self.total is not None and offset + length > self.total):
            return None
        if offset + length <= len(self.head):
            return self.head[offset : offset + length]
        if offset < len(self.head):
            rest = self.at(len(self.head), offset + length - len(self.head))
            return None if rest is None else self.head[offset:] + rest
        for start, data in self.ranges.items():
            if start <= offset and offset + length <= start + len(data):
                return data[offset - start : offset - start + length]
        if self.total is None:
            self.wanted.append((offset, length))
        else:
            start = self.total - len(self.tail)
            if offset >= start:
                return self.tail[offset - start : offset - start + length]
        return None

    def beyond(self, offset: int, length: int = 0) -> bool:
        """True if a structure is known to end behind the end of the stream."""
        return self.total is not None and offset + length > self.total


class Window:
    """Takes a stream in chunks of any size; calls `look` when the head is complete and after each wanted range.

    What is captured, and when `look` is called, depends on positions only, never on how the stream was cut.
    """

    __slots__ = (
        "_due", "_event", "_head", "_look", "_ranges", "_seen", "_tail", "_tail_bytes", "_wanted_bytes", "position",
    )  # fmt: skip

    def __init__(self, look: Callable[[View], None]) -> None:
        self._look = look
        self._head: bytes | bytearray = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._ranges: dict[int, tuple[int, bytes | bytearray]] = {}
        self._seen: set[tuple[int, int]] = set()
        self._wanted_bytes = 0
        self._due: float = HEAD  # the next position at which a range (or the head) is complete
        self._event: float = 0  # the next position from which a chunk needs more than the tail
        self.position = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        size = len(chunk)
        if self.position + size > self._event:
            self._capture(chunk)
        else:
            self.position += size
        if size >= TAIL:
            self._tail.clear()
            self._tail.append(chunk[-TAIL:])
            self._tail_bytes = TAIL
        elif size:
            self._tail.append(chunk)
            self._tail_bytes += size
            while self._tail_bytes - len(self._tail[0]) >= TAIL:
                self._tail_bytes -= len(self._tail.popleft())

    def finish(self) -> None:
        """The stream has ended: look for the last time."""
        tail = b"".join(self._tail)[-TAIL:]
        self._look(self._view(tail=tail, total=self.position))

    def forget(self) -> None:
        """Give up what is remembered."""
        self._head = b""
        self._tail.clear()
        self._ranges.clear()

    def _view(self, *, tail: bytes = b"", total: int | None = None) -> View:
        # What is complete is kept once, and shared with every view.
        if len(self._head) == HEAD:
            self._head = bytes(self._head)
        complete = {}
        for start, (length, data) in self._ranges.items():
            if len(data) == length:
                complete[start] = bytes(data)
                self._ranges[start] = (length, complete[start])
        return View(head=bytes(self._head), tail=tail, total=total, ranges=complete)

    def _capture(self, chunk: bytes) -> None:
        done = 0
        while done < len(chunk):
            # Cut at the next position where something gets complete: what is asked for then is still ahead.
            step = int(min(len(chunk) - done, max(self._due - self.position, 1)))
            start, stop = self.position, self.position + step
            if isinstance(self._head, bytearray):
                self._head += chunk[done : done + step]
            for first, (length, data) in self._ranges.items():
                if isinstance(data, bytearray) and first < stop and start < first + length:
                    begin = done + max(first - start, 0)
                    data.extend(chunk[begin : done + min(step, first + length - start)])
            self.position = stop
            done += step
            if stop >= self._due:
                self._advance()

    def _advance(self) -> None:
        view = self._view()
        self._look(view)
        for offset, length in view.wanted:
            self._want(offset, length)
        open_ranges = [(start, start + length) for start, (length, data) in self._ranges.items() if len(data) < length]
        self._due = min((stop for _, stop in open_ranges), default=math.inf)
        self._event = min((start for start, _ in open_ranges), default=math.inf)

    def _want(self, offset: int, length: int) -> None:
        if (offset, length) in self._seen or offset < self.position:
            return
        if len(self._seen) < WANTED and self._wanted_bytes + length <= WANTED_BYTES:
            self._seen.add((offset, length))
            self._wanted_bytes += length
            known = self._ranges.get(offset)
            if known is None or known[0] < length:
                self._ranges[offset] = (length, bytearray())
