"""Ctrl-C, and a source that is read so that it is noticed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, Final

import click

from imagestore import errors
from imagestore._commands.output import safe, to_json
from imagestore._commands.session import Session
from imagestore._models import MIB

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["cancelling", "open_source"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR: Final = "\x1b[?25h"


@contextlib.contextmanager
def cancelling(session: Session) -> Iterator[threading.Event]:
    """Within, Ctrl-C (or SIGTERM, or SIGHUP) sets the event, and only a second one ends the program where it is.

    An exception at any point could hit a commit or the taking back of an upload; the transfer itself knows better
    when to end.
    """
    cancel = threading.Event()

    def handler(number: int, _: FrameType | None) -> None:
        if cancel.is_set():
            _leave(session, number)
        session.signal = number
        cancel.set()
        if not session.json:
            _write("\nimagestore: breaking off; once more to leave at once\n")

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield cancel
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _leave(session: Session, number: int) -> None:
    """End the program, whatever its threads wait for."""
    code = 128 + number
    text = "broken off at once: see 'imagestore uploads' for what may be left"
    if session.json:
        _write(to_json({"error": "Cancelled", "message": text, "temporary": False, "exit_code": code}))
    else:
        _write(f"{_SHOW_CURSOR if sys.stderr.isatty() else ''}\nimagestore: {text}\n")
    os._exit(code)


def _write(text: str) -> None:
    # Past the buffers, in which the signal may have hit a write.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


class Pipe:
    """A stream that is read so that Ctrl-C is noticed while it has no data."""

    def __init__(self, stream: IO[bytes], cancel: threading.Event) -> None:
        self._fd = stream.fileno()
        self._cancel = cancel
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, MIB)

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; ``b""`` at the end."""
        while not select.select([self._fd], [], [], 0.2)[0]:
            self._check()
        data = os.read(self._fd, size)
        # Ctrl-C also ends the program at the other side, and its end must not look like that of the image.
        self._check()
        return data

    def _check(self) -> None:
        if self._cancel.is_set():
            raise KeyboardInterrupt


@contextlib.contextmanager
def open_source(file: str, cancel: threading.Event) -> Iterator[Any]:
    """What to give to ``Stores.add`` for ``file``."""
    if file == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError("there is no image on standard input: give a file, or a pipe to read from")
        yield _readable(sys.stdin.buffer, cancel)
        return
    try:
        stream = open(file, "rb", buffering=0)  # noqa: SIM115 - closed below; only failures to open are told so
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise errors.SourceError(f"can't read {safe(file)}: {reason}", operation="add") from error
    with stream:
        yield _readable(stream, cancel)


def _readable(stream: IO[bytes], cancel: threading.Event) -> Any:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except OSError:
        return stream
    # The library reads these at offsets and leaves holes out.
    return stream if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else Pipe(stream, cancel)
