"""`Session`: one run of the program, what it was told, the stores it uses, and the way to tell results and errors."""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from imagestore import _config_files, errors
from imagestore._commands.output import SIZES, cell, complain, field, print_fields, safe, to_json
from imagestore._demo import human
from imagestore._models import Location, Progress
from imagestore._store import Store
from imagestore._stores import Stores
from imagestore.errors import redact

__all__ = ["CLOSED", "CONFIG_FILES", "EXIT_CODES", "PROGRESS", "Session"]

EXIT_CODES: Final[tuple[tuple[int, str, tuple[type[errors.StoreError], ...]], ...]] = (
    (2, "the command, an id or a location is wrong, or the store can't do that", (errors.InvalidRequest,)),
    (3, "the configuration is wrong", (errors.ConfigurationError,)),
    (4, "no such image", (errors.NotFound,)),
    (
        5,
        "the id or the file is taken, the image is in use or was changed",
        (errors.AlreadyExists, errors.InUse, errors.Changed),
    ),
    (6, "access denied", (errors.AccessError,)),
    (7, "no room, or too large", (errors.CapacityError,)),
    (8, "the backend can't be reached or fails; trying again may help", (errors.Unavailable,)),
    (9, "a size, a digest or a signature is not as expected", (errors.IntegrityError,)),
    (10, "the image is not of the declared format, or is unsafe", (errors.FormatError,)),
    (11, "the source can't be read", (errors.SourceError,)),
    (
        130,
        "broken off with Ctrl-C (129: SIGHUP, 143: SIGTERM); an unfinished upload was taken back",
        (errors.Cancelled,),
    ),
)
"""Exit codes, what they mean, and the errors behind them. Besides: 0 done, 1 any other failure."""

CLOSED: Final = 128 + signal.SIGPIPE
"""The exit code when nobody reads our output any more."""

CONFIG_FILES: Final = ("imagestore.conf", *_config_files.CONFIG_FILES)
"""A person who is in a directory with a configuration means that one; a service never does."""

PROGRESS: Final = ("auto", "plain", "none")
EVERY: Final = 5.0
"""Seconds from one line of progress to the next."""

_OTHER: Final = 1

_log = logging.getLogger("imagestore")


@dataclasses.dataclass
class Session:
    """One run: what the options say, and the stores once they are needed.

    Attributes:
        config, store, json, verbose, progress: the options of these names.
        code: the exit code, as far as it is known.
        signal: the signal that broke the run off, or 0.
    """

    config: tuple[str, ...] = ()
    store: str | None = None
    json: bool = False
    verbose: int = 0
    progress: str = "auto"
    code: int = 0
    signal: int = 0
    _stores: Stores | None = None

    # Stores

    def files(self) -> tuple[str, ...]:
        """The configuration files: those of the options, of the environment, or the first that is found."""
        if self.config:
            return self.config
        if found := _config_files.default_config_files(CONFIG_FILES):
            return found
        raise errors.ConfigurationError(
            f"no configuration: name it with --config or {_config_files.CONFIG_VARIABLE}, or write one of "
            f"{', '.join(CONFIG_FILES)} ('imagestore demo' needs none)"
        )

    def stores(self) -> Stores:
        """All stores of the configuration."""
        from imagestore.config import load_stores

        if self._stores is None:
            self._stores = load_stores(*self.files())
        return self._stores

    def chosen(self) -> Store:
        """The store of ``--store``, or the default one."""
        stores = self.stores()
        return stores.default if self.store is None else stores[self.store]

    def find(self, image: str) -> tuple[Store, Location]:
        """The store and the location of an image that is named by its id or its location."""
        if "://" not in image:
            store = self.chosen()
            return store, store.locate(image)
        store = self.stores().for_location(image) if self.store is None else self.chosen()
        return store, store.parse(image)

    def close(self) -> None:
        """Close the stores."""
        if self._stores is not None:
            try:
                self._stores.close()
            except errors.StoreError as error:
                _log.warning("a store could not be closed: %s", error)

    # Results

    def emit(self, document: Mapping[str, Any], *, err: bool = False) -> None:
        """Write one JSON document on a line of its own."""
        (sys.stderr if err else sys.stdout).write(to_json(document))

    def show(self, pairs: Mapping[str, Any], document: Mapping[str, Any]) -> None:
        """Write one result: ``pairs`` for people and pipes, ``document`` as JSON."""
        if self.json:
            self.emit(document)
        elif sys.stdout.isatty():
            from imagestore._commands import terminal

            terminal.print_pairs((name, _exact(name, value)) for name, value in pairs.items())
        else:
            for name, value in pairs.items():
                print_fields(name, field(value))

    def rows(self, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], empty: str = "") -> int:
        """Write a list, and return its length. JSON has all values of a row, the others have ``columns``."""
        if sys.stdout.isatty() and not self.json:
            from imagestore._commands import terminal

            count = terminal.print_list(columns, ([cell(name, row[name]) for name in columns] for row in rows))
        else:
            count = 0
            for row in rows:
                count += 1
                if self.json:
                    self.emit(row)
                else:
                    print_fields(*(field(row[column]) for column in columns))
        if empty and not count:
            self.say(empty)
        return count

    def say(self, text: str) -> None:
        """Tell something to a person who watches."""
        if not self.json and sys.stderr.isatty():
            sys.stderr.write(safe(text) + "\n")

    def sum_up(self, text: str) -> None:
        """Tell the last line of a long command, also to a log file."""
        if sys.stderr.isatty():
            self.say(text)
        elif not self.json:
            complain(text)

    # Progress

    @contextmanager
    def showing(self, title: str) -> Iterator[Progress | None]:
        """A bar on a terminal; elsewhere nothing, or a line every few seconds if that is asked for."""
        if self.progress == "plain":
            yield _Lines(self, title)
        elif self.progress == "auto" and not self.json and sys.stderr.isatty():
            from imagestore._commands import terminal

            with terminal.bar(safe(title)) as report:
                yield report
        else:
            yield None

    def transferred(self, done: str, size: int, seconds: float, more: str = "") -> None:
        """The last line of a transfer."""
        if self.progress != "none":
            rate = f", {human(size / seconds)}/s" if size and seconds > 0.01 else ""
            self.sum_up(f"{done} {human(size)} in {seconds:.1f} s{rate}{more}")

    # Errors

    def failed(self, error: BaseException) -> None:
        """Report an error; the first one decides on the exit code."""
        code = self._report(error)
        self.code = self.code or code

    def _report(self, error: BaseException) -> int:
        if isinstance(error, (KeyboardInterrupt, errors.Cancelled)):
            code, kind = 128 + (self.signal or signal.SIGINT), "Cancelled"
            text = message = "broken off, nothing was kept" if self.signal else "broken off"
        elif isinstance(error, errors.StoreError):
            code = next((code for code, _, kinds in EXIT_CODES if isinstance(error, kinds)), _OTHER)
            kind = type(error).__name__
            text, message = f"{kind}: {error}", error.message or kind
        else:
            code, kind = _OTHER, type(error).__name__
            message = redact(str(error))
            if isinstance(error, OSError) and error.strerror:
                message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            text = f"{kind}: {message}"
        if self.json:
            known = {
                name: getattr(error, name, None)
                for name in ("store", "driver", "operation", "location", "image_id", "attempts", "retry_after")
            }
            temporary = bool(getattr(error, "temporary", False))
            self.emit({"error": kind, "message": message, **known, "temporary": temporary, "exit_code": code}, err=True)
        else:
            complain(text)
        if self.verbose > 1:
            sys.stderr.write(redact("".join(traceback.format_exception(error))))
        return code


def _exact(name: str, value: Any) -> str:
    exact = f" ({value:,} bytes)" if name in SIZES and value >= 1024 else ""
    return cell(name, value) + exact


class _Lines:
    """Progress as lines, for a log file or another program."""

    def __init__(self, session: Session, title: str) -> None:
        self._session = session
        self._title = title
        self._last = (time.monotonic(), 0)

    def __call__(self, done: int, total: int | None, /) -> None:
        now = time.monotonic()
        then, before = self._last
        if now - then < EVERY:
            return
        self._last = now, done
        rate = (done - before) / (now - then)
        left = None if total is None or rate <= 0 else round((total - done) / rate)
        if self._session.json:
            self._session.emit({"done": done, "total": total, "rate": round(rate), "seconds_left": left}, err=True)
            return
        share = f" of {human(total)} ({100 * done // total}%)" if total else ""
        end = "" if left is None else f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        complain(f"{self._title}: {human(done)}{share}, {human(rate)}/s{end}")
