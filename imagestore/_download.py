"""An image into a local file: ranges read in parallel, holes kept, checked, and put in place at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, Self

from imagestore._digest import Digests
from imagestore._models import MIB, Progress
from imagestore._pool import Share
from imagestore._reader import ResumingReader
from imagestore._transfer import data_runs
from imagestore.errors import AlreadyExists, Cancelled, InvalidRequest, StoreError

__all__ = ["Target", "fetch"]

RANGE: Final = 8 * MIB
WIDTH: Final = 8
GRAIN: Final = 4096


class Target:
    """A local file that appears under its name only when it is complete.

    ``with Target(path, overwrite=…) as target``: write at offsets, then `publish`. Leaving without it removes all.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool) -> None:
        self._path = Path(path)
        self._overwrite = overwrite
        self._part = self._path.with_name(f".{self._path.name[:100]}.{secrets.token_hex(8)}.part")
        self._fd = -1

    def __enter__(self) -> Self:
        if not self._overwrite and os.path.lexists(self._path):
            raise AlreadyExists(f"{self._path} exists already; overwrite=True would replace it")
        with self._errors():
            self._fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._part)

    def write(self, data: bytes, offset: int) -> None:
        """Write ``data`` at ``offset``; runs of zeros stay holes."""
        for start, stop in data_runs(data, GRAIN):
            view = memoryview(data)[start:stop]
            at = offset + start
            while view:
                with self._errors():
                    written = os.pwrite(self._fd, view, at)
                view, at = view[written:], at + written

    def publish(self, size: int) -> None:
        """Set the length, make it durable, and give it its name."""
        with self._errors():
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
            if self._overwrite:
                os.replace(self._part, self._path)
            else:
                self._link()
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _link(self) -> None:
        try:
            os.link(self._part, self._path)
        except FileExistsError as error:
            raise AlreadyExists(f"{self._path} was made by somebody else meanwhile") from error
        except OSError:
            # No hard links on this file system: the best that is left is to look and rename.
            if os.path.lexists(self._path):
                raise
            os.rename(self._part, self._path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            raise InvalidRequest(f"can't write to {self._path}: {error.strerror}") from error
        except OSError as error:
            raise StoreError(f"can't write to the local file {self._path}: {error.strerror or error}") from error


def fetch(
    open_range: Callable[[int, int], ResumingReader],
    size: int,
    target: Target,
    *,
    ranged: bool,
    pool: ThreadPoolExecutor,
    share: Share,
    digests: Digests,
    progress: Progress | None,
    check: Callable[[], None],
) -> None:
    """Read all ``size`` bytes into ``target``; digests see them in order."""
    ranges = deque((start, min(start + RANGE, size)) for start in range(0, size, RANGE))
    if not ranged:
        ranges = deque([(0, size)] if size else [])
    stop = threading.Event()
    pending: deque[tuple[int, Future[list[bytes]]]] = deque()

    def job(start: int, end: int) -> list[bytes]:
        kept: list[bytes] = []
        reader = open_range(start, end)
        try:
            position = start
            for chunk in reader:
                if stop.is_set():
                    raise Cancelled("the download ended")
                target.write(chunk, position)
                position += len(chunk)
                if len(digests):
                    kept.append(chunk)
        finally:
            reader.close()
        return kept

    def consume() -> None:
        amount, future = pending.popleft()
        for chunk in future.result():
            digests.update(chunk, _nothing, check)
        share.release(amount)

    try:
        if not ranged:
            _sequential(open_range, ranges, target, digests, progress, check)
            return
        done = 0
        while ranges or pending:
            check()
            if ranges and len(pending) < WIDTH:
                start, end = ranges[0]
                # Never wait for memory with blocks in hand: only this thread gives them back.
                free = share.try_acquire(end - start)
                if not free and not pending:
                    share.acquire(end - start, check)
                    free = True
                if free:
                    ranges.popleft()
                    pending.append((end - start, pool.submit(job, start, end)))
                    continue
            done += pending[0][0]
            consume()
            if progress is not None:
                progress(done, size)
    finally:
        stop.set()
        for _, future in pending:
            with contextlib.suppress(BaseException):
                future.result()
        share.close()


def _sequential(
    open_range: Callable[[int, int], ResumingReader],
    ranges: deque[tuple[int, int]],
    target: Target,
    digests: Digests,
    progress: Progress | None,
    check: Callable[[], None],
) -> None:
    for start, end in ranges:
        reader = open_range(start, end)
        try:
            position = start
            for chunk in reader:
                check()
                target.write(chunk, position)
                position += len(chunk)
                digests.update(chunk, _nothing, check)
                if progress is not None:
                    progress(position, end)
        finally:
            reader.close()


def _nothing() -> None:
    return None
