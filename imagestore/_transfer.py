"""The one place where bytes move into a store: block plan, zero runs, pump, commit.

::

    source ─► blocks (budget) ─► verifier ─► inspector ─► digests (a lane each) ─► write lanes (zero runs, retry)
                                             ▼
           all written · size equal · digests equal · format allowed · signature good
                                             ▼
                               commit (in doubt? the token decides)
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import TYPE_CHECKING, Final

from imagestore._digest import Digests, block_digest, compare
from imagestore._models import MIB, Progress, Retry, Verifier
from imagestore._pool import Lane, Room, Share
from imagestore._record import Record
from imagestore._retry import Backoff, Caller
from imagestore._source import Source, zeros
from imagestore.driver import Block, Capabilities, Upload
from imagestore.errors import (
    AlreadyExists,
    Cancelled,
    LimitExceeded,
    NotFound,
    SignatureMismatch,
    SizeMismatch,
    StoreError,
)

if TYPE_CHECKING:
    from imagestore.formats import Inspection, Inspector

__all__ = ["BlockPlan", "InDoubt", "Target", "Transfer", "commit", "common", "data_runs"]

BLOCK: Final = 8 * MIB
BLOCK_UNKNOWN: Final = 16 * MIB
HOLE_MIN: Final = 64 * 1024
PIECE: Final = MIB

_WAITING: Final = 4
"""Blocks for each write that may run: one that is written, one to follow, and what digests are behind with."""


class BlockPlan:
    """How long each block is.

    Without a limit on their number all blocks are as long as preferred (8 MiB, or what the backend's limits make of
    it). With one, an image of known size gets the shortest equal blocks, in whole MiB, that fit; an image of
    unknown size begins with 16 MiB and doubles in equally many steps (five or more) until ``max_size`` fits.

    Attributes:
        capacity: the largest image that fits, in bytes; None: any.
    """

    def __init__(self, caps: Capabilities, size: int | None, max_size: int, preferred: int | None = None) -> None:
        self.capacity: int | None = None
        self._caps = caps
        self._step: int | None = None
        self._first = self._fit(preferred or BLOCK)
        count = caps.blocks_max
        if count is None:
            return
        if caps.block_max is not None:
            self.capacity = caps.block_max * count
        if size is not None:
            grain = min(MIB, self._first)
            self._first = max(self._first, self._fit(-(-size // (count * grain)) * grain))
            return
        self._first = self._fit(preferred or BLOCK_UNKNOWN)
        tiers = min(5, count)
        while tiers < min(count, 40) and ((1 << tiers) - 1) * self._first * (count // tiers) < max_size:
            tiers += 1
        self._step = count // tiers
        self.capacity = sum(self.size_of(tier * self._step) * self._step for tier in range(tiers))

    @property
    def enough(self) -> int | None:
        """Bytes in memory that keep all writes busy; None where blocks grow. What waits beyond that only waits."""
        return None if self._step is not None else _WAITING * self._caps.parallel_writes * self._first

    def size_of(self, index: int) -> int:
        if self._step is None:
            return self._first
        return self._fit(self._first << min(index // self._step, 40))

    def _fit(self, length: int) -> int:
        unit = self._caps.sparse_unit or 1
        length = -(-max(length, self._caps.block_min) // unit) * unit
        return min(length, self._caps.block_max or length)


def common(all_caps: Iterable[Capabilities]) -> Capabilities:
    """Limits for blocks that every one of several backends can take, whole or cut into blocks of its own."""
    caps = list(all_caps)
    smallest = max(cap.block_min for cap in caps)
    counts = [cap.blocks_max for cap in caps if cap.blocks_max is not None]
    longest = [cap.block_max for cap in caps if cap.block_max is not None]
    units = [cap.sparse_unit for cap in caps if cap.sparse_unit is not None]
    # Short blocks are what others can be cut into; long ones limit.
    short = [length for length in longest if length < max(smallest, BLOCK)]
    return Capabilities(
        block_min=max([smallest, *short]),
        block_max=min((length for length in longest if length not in short), default=None),
        blocks_max=min(counts, default=None),
        sparse_unit=math.lcm(*units, *short) if units or short else None,
    )


def data_runs(data: bytes, unit: int) -> Iterator[tuple[int, int]]:
    """The parts (start, stop) of ``data`` that are not all zero, cut at multiples of ``unit``.

    Parts nearer than 64 KiB are one: a hole so small saves less than a request costs.
    """
    run: tuple[int, int] | None = None
    for start, stop in _coarse_runs(data, unit):
        start, stop = _trimmed(data, unit, start, stop)  # noqa: PLW2901 - the same run, shorter
        if run is not None and start - run[1] >= HOLE_MIN:
            yield run
            run = None
        run = (start if run is None else run[0]), stop
    if run is not None:
        yield run


def _coarse_runs(data: bytes, unit: int) -> Iterator[tuple[int, int]]:
    """What lies between windows of zeros of half the shortest hole: every hole has such a window in it."""
    size, step = len(data), max(unit, HOLE_MIN // 2 // unit * unit)
    zero = zeros(step)
    start = -1
    for position in range(0, size, step):
        # bytes.startswith compares with memcmp; the same with a memoryview, or any(), is a hundred times slower.
        if data.startswith(zero if size - position >= step else zeros(size - position), position):
            if start >= 0:
                yield start, position
            start = -1
        elif start < 0:
            start = position
    if start >= 0:
        yield start, size


def _trimmed(data: bytes, unit: int, start: int, stop: int) -> tuple[int, int]:
    zero = zeros(unit)
    while stop - start > unit and data.startswith(zero, start):
        start += unit
    while stop - start > unit and data.startswith(zeros(stop - (last := (stop - 1) // unit * unit)), last):
        stop = last
    return start, stop


class _Parties:
    """Calls ``done`` when the last of ``count`` users of a block is done with it."""

    def __init__(self, count: int, done: Callable[[], None]) -> None:
        self._count = count
        self._done = done
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._count -= 1
            last = self._count == 0
        if last:
            self._done()


class Target:
    """One upload of a transfer: writes blocks on a lane of its store's pool, skipping zeros, repeating what failed.

    Attributes:
        upload: where the bytes go.
        done: bytes of the image dealt with so far. stored: bytes sent to the backend.
    """

    def __init__(self, upload: Upload, caller: Caller, pool: ThreadPoolExecutor, retry: Retry, record: Record) -> None:
        self.upload = upload
        self._caller = caller
        self._caps = caller.driver.capabilities
        self._lane = Lane(pool, self._caps.parallel_writes)
        self._retry = retry
        self._record = record
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.done = 0
        self.stored = 0

    @property
    def error(self) -> BaseException | None:
        """What ended this target, while others may go on."""
        return self._lane.error

    def submit(self, block: Block, done: Callable[[], None]) -> None:
        # Not a lambda: the frame of one keeps what it closes over, and an error keeps the frame.
        self._lane.submit(functools.partial(self._write, block), done)

    def wait(self, check: Callable[[], None]) -> None:
        self._lane.wait(check=check)

    def close(self) -> None:
        """Nothing runs any more when it returns."""
        self._stop.set()
        self._lane.drop()

    def _write(self, block: Block) -> None:
        began = time.monotonic()
        sent = 0
        for part in self._parts(block):
            for piece in self._pieces(part):
                self._write_piece(piece)
                sent += len(piece.data)
        with self._lock:
            self.done += len(block.data)
            self.stored += sent
        self._record.block(block.index, len(block.data), sent, time.monotonic() - began)

    def _parts(self, block: Block) -> Iterator[Block]:
        """The block, or the blocks that it makes for a backend whose own are shorter than those of its companions."""
        longest = self._caps.block_max
        if longest is None or len(block.data) <= longest:
            yield block
            return
        for at in range(0, len(block.data), longest):
            data = block.data[at : at + longest]
            last = block.last and at + longest >= len(block.data)
            yield Block(index=(block.offset + at) // longest, offset=block.offset + at, data=data, last=last)

    def _pieces(self, block: Block) -> Iterator[Block]:
        if self._caps.sparse_unit is None:
            yield self._digested(block)
            return
        for start, stop in data_runs(block.data, self._caps.sparse_unit):
            if (start, stop) == (0, len(block.data)):
                yield self._digested(block)
                continue
            # A cut is a copy, which no budget counts: so it is a small one.
            step = max(self._caps.sparse_unit, PIECE // self._caps.sparse_unit * self._caps.sparse_unit)
            for at in range(start, stop, step):
                data = block.data[at : min(at + step, stop)]
                yield self._digested(Block(index=block.index, offset=block.offset + at, data=data, last=block.last))

    def _digested(self, block: Block) -> Block:
        algorithm = self._caps.block_digest
        if algorithm is None:
            return block
        digest = block_digest(algorithm, block.data)
        return Block(index=block.index, offset=block.offset, data=block.data, last=block.last, digest=digest)

    def _write_piece(self, piece: Block) -> None:
        backoff = Backoff(self._retry, stop=self._stop, notify=self._record.retried)
        while True:
            try:
                return self._caller("write", self.upload.write, self.upload.location, None, piece)
            except StoreError as error:
                if not self._caps.repeatable_writes:
                    raise
                backoff.failed(error, "write")


class Transfer:
    """Moves one source into one upload, or several. `run` returns when every check has passed; then comes `commit`.

    A target that fails is left out while others go on; `run` fails when none is left.

    Attributes:
        total: bytes read from the source.
        inspection: what the image is, if it was inspected.
    """

    def __init__(
        self,
        *,
        source: Source,
        targets: Sequence[Target],
        share: Share,
        plan: BlockPlan,
        size: int | None,
        max_size: int,
        digests: Digests,
        expected: Mapping[str, str],
        verifier: Verifier | None,
        inspector: Inspector | None,
        progress: Progress | None,
        cancel: threading.Event | None,
    ) -> None:
        self._source = source
        self._targets = targets
        self._share = share
        self._plan = plan
        self._size = size
        self._max_size = max_size if plan.capacity is None else min(max_size, plan.capacity)
        self._digests = digests
        self._expected = expected
        self._verifier = verifier
        self._inspector = inspector
        self._progress = progress
        self._cancel = cancel
        self._index = 0
        self._ended = False
        self.total = 0
        self.inspection: Inspection | None = None

    def run(self) -> dict[str, str]:
        """All bytes stored and checked: returns the digests. Whatever is raised, nothing runs any more."""
        try:
            while (more := self._next()) is not None:
                block, room = more
                self._verify(block)
                self._inspect(block)
                parties = _Parties(len(self._digests) + len(self._targets), room.release)
                only = block.last and block.index == 0
                self._digests.update(block.data, parties, self._check, inline=only)
                for target in self._targets:
                    target.submit(block, parties)
                # Its users give it back; it must not be kept while the next one waits for its room.
                del block, more
                self._report()
            for target in self._targets:
                target.wait(self._check)
            self._check()
            found = self._digests.finish()
            compare(self._expected, found)
            self._judge()
            self._sign()
            self._report()
            return found
        finally:
            for target in self._targets:
                target.close()
            self._digests.close()
            self._share.close()

    def _next(self) -> tuple[Block, Room] | None:
        """The next whole block, within the budget. The size is checked here: a longer source is refused at once."""
        if self._ended:
            return None
        length = self._plan.size_of(self._index)
        if self._size is not None:
            length = min(length, self._size - self.total)
        if length == 0:
            if not self._source.ended():
                raise SizeMismatch(f"the source has more than the {self._size} bytes declared")
            return None
        room = self._share.room(length, self._check)
        data = self._source.block(length, room.buffer)
        room.settle(len(data))
        offset, self.total = self.total, self.total + len(data)
        if self._size is not None and len(data) < length:
            raise SizeMismatch(f"the source ended after {self.total} of the {self._size} bytes declared")
        if self.total > self._max_size:
            raise LimitExceeded(f"the image is larger than {self._max_size} bytes")
        if not data:
            return None
        last = self.total == self._size if self._size is not None else len(data) < length or self._source.ended()
        self._check()
        self._ended = last and self._size is None
        self._index += 1
        return Block(index=self._index - 1, offset=offset, data=data, last=last), room

    def _check(self) -> None:
        errors = [target.error for target in self._targets]
        if errors[0] is not None and None not in errors:
            raise errors[0]
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("the caller cancelled the transfer")

    def _verify(self, block: Block) -> None:
        if self._verifier is not None:
            try:
                self._verifier.update(block.data)
            except Exception as error:
                raise SignatureMismatch(f"the verifier failed with {type(error).__name__}: {error}") from error

    def _inspect(self, block: Block) -> None:
        """A refusal that is certain ends the transfer at once: the rest of the image need not be sent."""
        if self._inspector is not None:
            self._inspector.feed(block.data)
            if self._inspector.refusal is not None:
                raise self._inspector.refusal

    def _judge(self) -> None:
        if self._inspector is not None:
            self.inspection = self._inspector.finish()
            if self._inspector.refusal is not None:
                raise self._inspector.refusal

    def _sign(self) -> None:
        if self._verifier is not None:
            try:
                self._verifier.verify()
            except Exception as error:
                raise SignatureMismatch(f"the verifier refused it with {type(error).__name__}: {error}") from error

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(min((t.done for t in self._targets if t.error is None), default=0), self._size)


class _Found(Enum):
    OURS = "ours"
    OTHERS = "others"
    NOTHING = "nothing"
    UNKNOWN = "unknown"


def commit(upload: Upload, size: int, token: str, caller: Caller, backoff: Backoff) -> None:
    """Make the upload visible; an attempt whose outcome is not known is looked into before anything else is done.

    Raises `AlreadyExists` if somebody else's image is there, and `InDoubt` if nobody can tell whose it is.
    """
    doubt = False
    while True:
        try:
            return caller("commit", upload.commit, upload.location, None, size)
        except StoreError as error:
            known = isinstance(error, (AlreadyExists, NotFound))
            if not error.temporary and not (doubt and known):
                raise
            found = _look(upload, size, token, caller, backoff, error)
            if found is _Found.OURS:
                # The image stands; what the driver would have tidied up after its lost step is not worth an error.
                with contextlib.suppress(StoreError):
                    caller("abort", upload.abort, upload.location)
                return None
            if found is _Found.OTHERS:
                raise AlreadyExists(
                    "another image got this id first", location=upload.location.uri, image_id=error.image_id
                ) from error
            if not error.temporary:
                if found is _Found.UNKNOWN:
                    raise InDoubt(error) from error
                raise
            doubt = True
            backoff.failed(error, "commit")


def _look(upload: Upload, size: int, token: str, caller: Caller, backoff: Backoff, cause: StoreError) -> _Found:
    """What stands at the upload's location after a commit in doubt."""
    while True:
        try:
            stat = caller("stat", caller.driver.stat, upload.location, None, upload.location)
        except NotFound:
            return _Found.NOTHING
        except StoreError as error:
            try:
                backoff.failed(error, "stat")
            except StoreError:
                raise InDoubt(cause) from error
            continue
        if not caller.driver.capabilities.commit_proof or stat.token is None:
            return _Found.UNKNOWN
        return _Found.OURS if stat.token == token and stat.size == size else _Found.OTHERS


class InDoubt(Exception):
    """Nobody knows whether the commit took effect, so nothing may be taken back. Carries the error of the commit."""

    def __init__(self, error: StoreError) -> None:
        super().__init__(str(error))
        self.error = error
