"""The commands of `imagestore`, on click; tables and progress bars are rich's.

On a terminal results are tables; in a pipe they are lines of values with tabs between them; with ``--json`` they are
JSON documents. Results go to standard output, all else to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import os
import re
import select
import signal
import stat as stat_module
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

import click

from imagestore import _demo, errors
from imagestore._demo import human
from imagestore._models import MIB, Leftover, Location, Progress
from imagestore._store import Store
from imagestore._stores import Stores
from imagestore.errors import redact

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console
    from rich.table import Table

__all__ = ["EXIT_CODES", "cli"]

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
    (130, "broken off with Ctrl-C (143: SIGTERM); an unfinished upload was taken back", (errors.Cancelled,)),
)
"""Exit codes, what they mean, and the errors behind them. Besides: 0 done, 1 any other failure."""

_OTHER: Final = 1
_CLOSED: Final = 128 + signal.SIGPIPE

_CONFIG_FILES: Final = (
    "imagestore.conf",
    "~/.config/imagestore/imagestore.conf",
    "/etc/imagestore/imagestore.conf",
)
_CONFIG_VARIABLE: Final = "IMAGESTORE_CONFIG"

_VERBS: Final = ("create", "delete", "list", "uploads", "discard", "usage", "copy", "sign", "set_acls", "bind")

_log = logging.getLogger("imagestore")

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass
class Session:
    """One run: what the global options say, and the stores once they are needed."""

    config: tuple[str, ...] = ()
    store: str | None = None
    json: bool = False
    verbose: int = 0
    code: int = 0
    signal: int = 0
    left: bool = False
    _stores: Stores | None = None

    def files(self) -> tuple[str, ...]:
        """The configuration files: those of the options, of the environment, or the first that is found."""
        if self.config:
            return self.config
        if given := tuple(path for path in os.environ.get(_CONFIG_VARIABLE, "").split(os.pathsep) if path):
            return given
        for path in _CONFIG_FILES:
            if os.path.exists(found := os.path.expanduser(path)):
                return (found,)
        raise errors.ConfigurationError(
            f"no configuration: name it with --config or {_CONFIG_VARIABLE}, or write one of "
            f"{', '.join(_CONFIG_FILES)} ('imagestore demo' needs none)"
        )

    def stores(self) -> Stores:
        from imagestore.config import load_stores

        if self._stores is None:
            self._stores = load_stores(*self.files())
        return self._stores

    def chosen(self) -> Store:
        """The store of ``--store``, or the default one."""
        stores = self.stores()
        if self.store is None:
            return stores.default
        if self.store not in stores:
            raise errors.InvalidRequest(f"there is no store {self.store!r}, only {', '.join(stores)}")
        return stores[self.store]

    def find(self, image: str) -> tuple[Store, Location]:
        """The store and the location of an image that is named by its id or its location."""
        if "://" not in image:
            store = self.chosen()
            return store, store.locate(image)
        store = self.chosen() if self.store is not None else self.stores().for_location(image)
        return store, store.parse(image)

    def close(self) -> None:
        if self._stores is not None:
            try:
                self._stores.close()
            except errors.StoreError as error:
                _log.warning("a store could not be closed: %s", error)

    def failed(self, error: BaseException) -> None:
        """Report an error; the first one decides on the exit code."""
        code = self._report(error)
        self.code = self.code or code

    def _report(self, error: BaseException) -> int:
        if isinstance(error, (KeyboardInterrupt, errors.Cancelled)):
            code = 128 + (self.signal or signal.SIGINT)
            kind, text = "Cancelled", "broken off"
            if self.left:
                text += " at once: see 'imagestore uploads' for what may be left"
            elif self.signal:
                text += ", nothing was kept"
        elif isinstance(error, errors.StoreError):
            code = next((code for code, _, kinds in EXIT_CODES if isinstance(error, kinds)), _OTHER)
            kind, text = type(error).__name__, str(error)
        else:
            code, kind = _OTHER, type(error).__name__
            text = f"{error.filename or ''}: {error.strerror}" if isinstance(error, OSError) else redact(str(error))
            text = text.removeprefix(": ")
        if self.json:
            message = error.message or kind if isinstance(error, errors.StoreError) and kind != "Cancelled" else text
            known = {
                name: getattr(error, name, None)
                for name in ("store", "driver", "operation", "location", "image_id", "attempts", "retry_after")
            }
            temporary = bool(getattr(error, "temporary", False))
            self.emit({"error": kind, "message": message, **known, "temporary": temporary, "exit_code": code}, err=True)
        else:
            _complain(f"{kind}: {text}" if kind != "Cancelled" else text)
        if self.verbose > 1:
            sys.stderr.write(redact("".join(traceback.format_exception(error))))
        return code

    def emit(self, document: Mapping[str, Any], *, err: bool = False) -> None:
        """Write one JSON document on a line of its own."""
        (sys.stderr if err else sys.stdout).write(json.dumps(document, default=_plain) + "\n")

    def show(self, pairs: Mapping[str, Any], document: Mapping[str, Any] | None = None) -> None:
        """Write one result: ``pairs`` for people and pipes, ``document`` (or the same) as JSON."""
        if self.json:
            self.emit(pairs if document is None else document)
        elif sys.stdout.isatty():
            table = _grid()
            for name, value in pairs.items():
                exact = f" ({value:,} bytes)" if name in _SIZES and value >= 1024 else ""
                table.add_row(name, _cell(name, value) + exact)
            _console().print(table)
        else:
            for name, value in pairs.items():
                _print(name, _field(value))

    def rows(self, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], empty: str = "") -> int:
        """Write a list, and return its length. JSON has all values of a row, the others have ``columns``."""
        count = 0
        table = None if self.json or not sys.stdout.isatty() else _table(columns)
        for row in rows:
            count += 1
            if table is not None:
                table.add_row(*(_cell(column, row[column]) for column in columns))
            elif self.json:
                self.emit(row)
            else:
                _print(*(_field(row[column]) for column in columns))
        if table is not None and count:
            _console().print(table)
        elif empty:
            self.say(empty)
        return count

    def say(self, text: str) -> None:
        """Tell something to whoever watches."""
        if not self.json and sys.stderr.isatty():
            sys.stderr.write(_safe(text) + "\n")


class _Commands(click.Group):
    """Turns every failure into a line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        session = ctx.ensure_object(Session)
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except (click.exceptions.Exit, click.Abort):
            raise
        except click.ClickException as error:
            if not session.json:
                raise
            session.emit(
                {"error": type(error).__name__, "message": error.format_message(), "exit_code": error.exit_code},
                err=True,
            )
            session.code = session.code or error.exit_code
        except BrokenPipeError:
            # Whoever read our output has enough.
            session.code = _CLOSED
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - one line for the user, whatever it is
            session.failed(error)
        _finish_output()
        ctx.exit(session.code)


def _finish_output() -> None:
    """Write what is buffered; if that can't be, drop it, or the interpreter would fail on it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        session = ctx.ensure_object(Session)
        if name == "config":
            session.config += value
        elif name == "verbose":
            session.verbose += value
        elif value:
            setattr(session, name, value)

    return callback


def _global_options() -> list[click.Option]:
    """May stand before the command or after it."""

    def option(name: str, *names: str, **settings: Any) -> click.Option:
        return click.Option([*names, f"--{name}"], expose_value=False, callback=_set(name), **settings)

    return [
        option("config", metavar="FILE", multiple=True, help="A configuration file, or a directory of them."),
        option("store", metavar="NAME", help="The store to use, not the default one or that of a location."),
        option("json", is_flag=True, is_eager=True, help="Results and errors as JSON; a document per line for lists."),
        option("verbose", "-v", count=True, help="Tell more of what happens; -vv also where an error came from."),
    ]


def _console(*, err: bool = False, width: int | None = None) -> Console:
    from rich import console

    class Console(console.Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704 - rich calls this while it handles the error, which is ours to handle

    return Console(stderr=err, highlight=False, markup=False, emoji=False, width=width)


_SIZES: Final = frozenset({"size", "bytes", "stored", "free", "total"})
_NUMBERS: Final = _SIZES | {"weight"}
_LONG: Final = frozenset({"image_id", "token", "location", "description", "package"})


def _table(columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.replace("_", " "),
            justify="right" if column in _NUMBERS else "left",
            overflow="fold",
            no_wrap=column not in _LONG,
        )
    return table


def _grid() -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _cell(column: str, value: Any) -> str:
    """A value for people."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
    if column in _SIZES:
        return human(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _safe(str(value))


def _field(value: Any) -> str:
    """A value for a pipe: sizes in bytes, times in ISO 8601, nothing for what is not known."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _safe(str(_plain(value)))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _safe(text: str) -> str:
    """``text`` without characters that would drive a terminal: names in a store come from strangers."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _print(*fields: str) -> None:
    sys.stdout.write((" " if sys.stdout.isatty() else "\t").join(fields) + "\n")


def _complain(text: str) -> None:
    lines = "\n".join(_safe(line) for line in text.split("\n"))
    mark = "imagestore:"
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        mark = click.style(mark, fg="red", bold=True)
    sys.stderr.write(f"{mark} {lines}\n")


class _LogHandler(logging.Handler):
    """Writes what the library tells to wherever standard error is at that moment."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        text = redact(record.getMessage())
        if self._session.json:
            self._session.emit({"level": record.levelname.lower(), "message": text}, err=True)
        else:
            sys.stderr.write(f"imagestore: {record.levelname.lower()}: {_safe(text)}\n")


@contextlib.contextmanager
def _logging(session: Session) -> Iterator[None]:
    # Only our own: what an SDK logs in detail may hold credentials.
    handler = _LogHandler(session)
    level = _log.level
    _log.addHandler(handler)
    _log.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(session.verbose, 2)])
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)


@contextlib.contextmanager
def _progress(session: Session, title: str) -> Iterator[Progress | None]:
    """A bar on a terminal, with rate and time left; nothing elsewhere."""
    if session.json or not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{human(speed)}/s" if speed else "")

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        Rate(),
        progress.TimeRemainingColumn(),
        console=_console(err=True),
        transient=True,
        redirect_stdout=False,
    )
    with bar:
        task = bar.add_task(_safe(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


_BYTES: Final = re.compile(r"(\d+)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)
_AGE: Final = re.compile(r"(\d{1,9})([smhd]?)")


def _bytes(text: str) -> int:
    match = _BYTES.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a number of bytes, such as 4096, 512MiB or 10GB")
    base = 1024 if match[3] else 1000
    size: int = int(match[1]) * base ** " kmgt".index((match[2] or " ").lower())
    return size


def _age(text: str) -> timedelta:
    match = _AGE.fullmatch(text)
    if match is None or (not match[2] and int(match[1])):
        raise click.BadParameter(f"{text!r} is not an age, such as 24h, 30m, 90s, 7d or 0")
    age = timedelta(seconds=int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])
    if age > timedelta(days=365_000):
        raise click.BadParameter(f"{text!r} is before anything was stored")
    return age


def _pair(separator: str, form: str) -> Callable[[str], tuple[str, str]]:
    def convert(text: str) -> tuple[str, str]:
        first, found, second = text.partition(separator)
        if not (first and found):
            raise click.BadParameter(f"{text!r} is not of the form {form}")
        return first, second

    return convert


def _mapping(pairs: Sequence[tuple[str, str]], option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise click.UsageError(f"{option} is given twice for {name}")
    return found


_expect = click.option(
    "--expect",
    type=_pair(":", "sha256:HEX"),
    metavar="NAME:HEX",
    multiple=True,
    help="Fail unless the image has this digest, such as sha256:HEX. May be given several times.",
)
_digest = click.option(
    "--digest",
    metavar="NAME",
    multiple=True,
    help="A digest to compute, such as md5 or sha512 (default sha256). May be given several times.",
)


@contextlib.contextmanager
def _cancelling(session: Session) -> Iterator[threading.Event]:
    """Within, Ctrl-C (or SIGTERM) sets the event, and only a second one breaks off wherever the program is.

    An exception at any point could hit a commit or the taking back of an upload; the transfer itself knows better
    when to end.
    """
    cancel = threading.Event()

    def handler(number: int, _: FrameType | None) -> None:
        if cancel.is_set():
            session.left = True
            raise KeyboardInterrupt
        session.signal = number
        cancel.set()
        if not session.json:
            with contextlib.suppress(OSError):
                os.write(2, b"\nimagestore: breaking off, nothing will be kept; once more to leave at once\n")

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield cancel
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class _Pipe:
    """A stream that is read so that Ctrl-C is noticed while it has no data."""

    def __init__(self, stream: IO[bytes], cancel: threading.Event) -> None:
        self._fd = stream.fileno()
        self._cancel = cancel
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, MIB)

    def read(self, size: int, /) -> bytes:
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
def _source(file: str, cancel: threading.Event) -> Iterator[Any]:
    """What to give to ``Store.add`` for ``file``."""
    if file == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError("there is no image on standard input: give a file, or a pipe to read from")
        yield _readable(sys.stdin.buffer, cancel)
        return
    try:
        stream = open(file, "rb", buffering=0)  # noqa: SIM115 - closed below; only failures to open are told so
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise errors.SourceError(f"can't read {_safe(file)}: {reason}", operation="add") from error
    with stream:
        yield _readable(stream, cancel)


def _readable(stream: IO[bytes], cancel: threading.Event) -> Any:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except OSError:
        return stream
    # The library reads these at offsets and leaves holes out.
    return stream if stat_module.S_ISREG(mode) or stat_module.S_ISBLK(mode) else _Pipe(stream, cancel)


def _check_target(file: str, force: bool) -> None:
    if not os.path.lexists(file):
        return
    if not os.path.isfile(file):
        raise click.UsageError(
            f"{_safe(file)} is not a regular file; to write into a device or a pipe: imagestore get IMAGE - > FILE"
        )
    if not force:
        raise errors.AlreadyExists(f"the file {_safe(file)} exists; --force replaces it", operation="get")


def _epilog() -> str:
    codes = [(0, "done"), (1, "any other failure; a check found faults"), *((c, text) for c, text, _ in EXIT_CODES)]
    codes.append((_CLOSED, "standard output was closed before the end"))
    lines = "\n".join(f"  {code:<4} {text}" for code, text in codes)
    return (
        "Configuration files are looked for in --config, the environment variable "
        f"{_CONFIG_VARIABLE} (with colons between them), and then the first of {', '.join(_CONFIG_FILES)}. "
        "The options above may also stand after a command.\n\n"
        "Results are tables on a terminal, and lines of values with tabs between them in a pipe.\n\n"
        f"\b\nExit codes:\n{lines}\n\n"
        "\b\nShell completion (bash; zsh and fish alike):\n"
        '  eval "$(_IMAGESTORE_COMPLETE=bash_source imagestore)"'
    )


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_epilog(),
)
@click.version_option(package_name="imagestore", prog_name="imagestore")
def cli() -> None:
    """Puts virtual-machine images into any storage, whole and verified, and gets them back.

    An IMAGE is an image id, looked for in the default store or the one of --store, or a location (a URI).
    """


cli.params += _global_options()


def _command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(session: Session, /, **arguments: Any) -> None:
            with _logging(session), contextlib.closing(session):
                function(session, **arguments)

        command = cli.command(name)(click.pass_obj(run))
        command.params += _global_options()
        return command

    return decorate


@_command("add")
@click.argument("image_id", metavar="ID")
@click.argument("file")
@click.option("--size", type=_bytes, metavar="BYTES", help="Length of the image; one of another length is refused.")
@_digest
@_expect
@click.option(
    "--metadata",
    type=_pair("=", "NAME=VALUE"),
    metavar="NAME=VALUE",
    multiple=True,
    help="Kept with the image where the backend can.",
)
def _add(
    session: Session,
    image_id: str,
    file: str,
    size: int | None,
    digest: tuple[str, ...],
    expect: tuple[tuple[str, str], ...],
    metadata: tuple[tuple[str, str], ...],
) -> None:
    """Store FILE as image ID, whole or not at all.

    With - as FILE the image is read from standard input. The end of a pipe looks the same if the program that writes
    into it failed: name the --size, or a digest to --expect, if that could be.
    """
    expected, kept = _mapping(expect, "--expect"), _mapping(metadata, "--metadata")
    store = session.chosen()
    began = time.monotonic()
    with _cancelling(session) as cancel, _source(file, cancel) as source, _progress(session, image_id) as progress:
        result = store.add(
            image_id,
            source,
            size=size,
            digests=digest or ("sha256",),
            expected=expected,
            metadata=kept,
            progress=progress,
            cancel=cancel,
        )
    seconds = time.monotonic() - began
    session.show(
        {"location": result.location.uri, "size": result.size, "stored": result.stored, **result.digests},
        {
            "image_id": result.image_id,
            "store": result.store,
            "location": result.location.uri,
            "size": result.size,
            "stored": result.stored,
            "digests": result.digests,
            "version": result.stat.version,
            "seconds": round(seconds, 3),
        },
    )
    session.say(_summary("stored", result.size, seconds))


@_command("get")
@click.argument("image")
@click.argument("file")
@click.option("--start", type=_bytes, metavar="BYTES", default="0", help="The first byte to get (default 0).")
@click.option("--stop", type=_bytes, metavar="BYTES", help="The first byte not to get (default: the end).")
@_expect
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def _get(
    session: Session,
    image: str,
    file: str,
    start: int,
    stop: int | None,
    expect: tuple[tuple[str, str], ...],
    force: bool,
) -> None:
    """Read IMAGE into FILE.

    FILE appears when it is complete and as expected, and has holes where the image has nothing but zeros. With - as
    FILE the image goes to standard output, and can be checked only at its end: look at the exit code.
    """
    expected = _mapping(expect, "--expect")
    partial = bool(start) or stop is not None
    if partial and expected:
        raise click.UsageError("--expect is of a whole image, not of a range")
    if file == "-":
        if sys.stdout.isatty() and not force:
            raise click.UsageError("an image would garble the terminal: give a file or a pipe, or --force")
    else:
        _check_target(file, force)
    store, location = session.find(image)
    began = time.monotonic()
    digests: Mapping[str, str] = expected
    with _progress(session, image) as progress:
        if file == "-":
            size = _stream(store, location, start, stop, expected, progress)
        elif partial:
            with _cancelling(session) as cancel:
                size = _get_range(store, location, file, start, stop, force, progress, cancel)
        else:
            with _cancelling(session) as cancel:
                result = store.download(
                    location, file, expected=expected, overwrite=force, progress=progress, cancel=cancel
                )
            size, digests = result.size, result.digests
    seconds = time.monotonic() - began
    document = {
        "store": store.name,
        "location": location.uri,
        "file": file,
        "size": size,
        "digests": digests,
        "seconds": round(seconds, 3),
    }
    if file != "-":
        session.show({"file": file, "size": size, **digests}, document)
    elif session.json:
        session.emit(document, err=True)
    session.say(_summary("got", size, seconds))


def _stream(
    store: Store,
    location: Location,
    start: int,
    stop: int | None,
    expected: Mapping[str, str],
    progress: Progress | None,
) -> int:
    output = sys.stdout.buffer
    with store.get(location, start=start, stop=stop, expected=expected, progress=progress) as reader:
        for chunk in reader:
            output.write(chunk)
        output.flush()
        return reader.size


def _get_range(
    store: Store,
    location: Location,
    file: str,
    start: int,
    stop: int | None,
    force: bool,
    progress: Progress | None,
    cancel: threading.Event,
) -> int:
    from imagestore._download import Target

    with (
        store.get(location, start=start, stop=stop, progress=progress, cancel=cancel) as reader,
        Target(file, overwrite=force) as target,
    ):
        position = 0
        for chunk in reader:
            target.write(chunk, position)
            position += len(chunk)
        target.publish(position)
    return position


def _summary(done: str, size: int, seconds: float) -> str:
    rate = f", {human(size / seconds)}/s" if size and seconds > 0.01 else ""
    return f"{done} {human(size)} in {seconds:.1f} s{rate}"


@_command("stat")
@click.argument("image")
def _stat(session: Session, image: str) -> None:
    """Tell what the backend knows of IMAGE."""
    store, location = session.find(image)
    found = store.stat(location)
    known = {
        "store": store.name,
        "location": location.uri,
        "size": found.size,
        "version": found.version,
        "modified": found.modified,
        "token": found.token,
    }
    session.show(
        {**known, **{f"metadata {name}": value for name, value in found.metadata.items()}},
        {"image_id": location.image_id, **known, "metadata": found.metadata},
    )


@_command("list")
def _list(session: Session) -> None:
    """List the images of a store.

    In a pipe: id, bytes, time, location.
    """
    store = session.chosen()
    images = (
        {
            "image_id": image.image_id,
            "size": image.size,
            "modified": image.modified,
            "location": image.location.uri,
            "store": store.name,
        }
        for image in store.list()
    )
    columns = ("image_id", "size", "modified", "location")
    count = session.rows(columns, images, f"there is no image in the store {store.name}")
    if count:
        session.say(f"{count} image{'s' * (count > 1)} in the store {store.name}")


@_command("verify")
@click.argument("image")
@_digest
@_expect
def _verify(session: Session, image: str, digest: tuple[str, ...], expect: tuple[tuple[str, str], ...]) -> None:
    """Read all of IMAGE and tell its digests.

    Fails if one is not as expected.
    """
    expected = _mapping(expect, "--expect")
    store, location = session.find(image)
    began = time.monotonic()
    with _progress(session, image) as progress:
        result = store.verify(
            location, expected=expected, digests=digest or (() if expected else ("sha256",)), progress=progress
        )
    session.show(
        {"location": result.location.uri, "size": result.size, **result.digests},
        {
            "store": store.name,
            "location": result.location.uri,
            "size": result.size,
            "digests": result.digests,
            "compared": sorted(expected),
        },
    )
    agreed = f"; as expected: {', '.join(expected)}" if expected else ""
    session.say(_summary("read", result.size, time.monotonic() - began) + agreed)


@_command("delete")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
def _delete(session: Session, images: tuple[str, ...]) -> None:
    """Delete images, without asking.

    One that can't be deleted does not keep the others.
    """
    for image in images:
        try:
            store, location = session.find(image)
            store.delete(location)
        except errors.ConfigurationError:
            raise
        except errors.StoreError as error:
            session.failed(error)
        else:
            done = {"image": image, "store": store.name, "location": location.uri, "deleted": True}
            if session.json:
                session.emit(done)
            else:
                _print("deleted", _safe(location.uri))


_LEFTOVER: Final = ("token", "image_id", "bytes", "last_activity", "alive")


def _leftover(store: Store, leftover: Leftover) -> dict[str, Any]:
    return {
        "token": leftover.token,
        "image_id": leftover.image_id,
        "bytes": leftover.bytes,
        "started": leftover.started,
        "last_activity": leftover.last_activity,
        "alive": leftover.alive,
        "store": store.name,
    }


@_command("uploads")
def _uploads(session: Session) -> None:
    """List unfinished uploads.

    Those that run, and what others left behind. In a pipe: token, id, bytes, last activity, alive.
    """
    store = session.chosen()
    session.rows(
        _LEFTOVER,
        (_leftover(store, leftover) for leftover in store.uploads()),
        f"there is no unfinished upload in the store {store.name}",
    )


@_command("collect")
@click.option(
    "--older-than",
    type=_age,
    metavar="AGE",
    default="24h",
    help="Only what shows no activity for so long (default 24h).",
)
@click.option("--include-alive", is_flag=True, help="Also uploads that are known to run; they will fail.")
@click.option("--dry-run", is_flag=True, help="Remove nothing, only tell what would be removed.")
def _collect(session: Session, older_than: timedelta, include_alive: bool, dry_run: bool) -> None:
    """Remove what unfinished uploads left behind.

    AGE is 24h, 30m, 90s, 7d or 0, for example.
    """
    store = session.chosen()
    found = store.collect(older_than=older_than, include_alive=include_alive, dry_run=dry_run)
    count = session.rows(
        _LEFTOVER,
        ({**_leftover(store, leftover), "removed": not dry_run} for leftover in found),
        f"there is nothing to remove in the store {store.name}",
    )
    if count:
        total = sum(leftover.bytes or 0 for leftover in found)
        verb = "would be removed" if dry_run else "removed"
        session.say(f"{count} {verb}, {human(total)}")


@_command("check-config")
@click.argument("files", metavar="[FILE]...", nargs=-1)
@click.option("--connect", is_flag=True, help="If there is no fault, also open every store.")
def _check_config(session: Session, files: tuple[str, ...], connect: bool) -> None:
    """Tell every fault of the configuration.

    Each by file, section and option; the exit code is 1 if there are any.
    """
    from imagestore.config import check, load_stores

    paths = files or session.files()
    problems = check(paths)
    for problem in problems:
        if session.json:
            session.emit(
                {
                    "error": problem.error.__name__,
                    "message": problem.message,
                    "file": problem.file,
                    "line": problem.line,
                    "section": problem.section,
                    "option": problem.option,
                }
            )
        else:
            _print(_safe(str(problem)))
    if problems:
        session.code = 1
        session.say(f"{len(problems)} fault{'s' * (len(problems) > 1)}")
        return
    if not connect:
        session.say(f"no fault in {', '.join(paths)}")
        return
    with load_stores(*paths) as stores:
        for name, store in ((store.name, store) for store in stores.values()):
            try:
                _ = store.capabilities
            except errors.StoreError as error:
                session.failed(error)
                session.code = 1
            else:
                if session.json:
                    session.emit({"store": name, "type": store.driver_name, "connected": True})
                else:
                    _print(_safe(name), "ok")


@_command("stores")
@click.option("--connect", is_flag=True, help="Open every store, and tell what it guarantees and how much room it has.")
@click.option("--types", is_flag=True, help="List the installed driver types instead; needs no configuration.")
def _stores(session: Session, connect: bool, types: bool) -> None:
    """List the configured stores."""
    if types:
        from imagestore.config import available_drivers

        rows = ({"type": name, "package": package} for name, package in available_drivers().items())
        session.rows(("type", "package"), rows)
        return
    stores = session.stores()
    columns = ["name", "type", "default", "weight", "description"]
    if connect:
        columns[-1:] = ["collision", "free", "total", "description"]
    wanted = [session.chosen()] if session.store is not None else list(stores.values())
    default = stores.default_name or (next(iter(stores)) if len(stores) == 1 else None)
    session.rows(columns, (_describe(session, store, store.name == default, connect) for store in wanted))


def _describe(session: Session, store: Store, default: bool, connect: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": store.name,
        "type": store.driver_name,
        "default": default,
        "weight": store.weight,
        "description": store.description,
    }
    if not connect:
        return row
    verbs = [verb for verb in _VERBS if store.supports(verb)]
    row |= {"collision": None, "free": None, "total": None, "verbs": verbs}
    try:
        capabilities = store.capabilities
        row |= {"collision": capabilities.collision}
        if session.json:
            row["capabilities"] = dataclasses.asdict(capabilities)
        if store.supports("usage") and not capabilities.needs_auth:
            usage = store.usage()
            row |= {"free": usage.free, "total": usage.total, "used": usage.used}
    except errors.StoreError as error:
        row["error"] = str(error)
        session.failed(error)
    return row


@_command("demo")
@click.option(
    "--size",
    type=_bytes,
    metavar="BYTES",
    default=str(_demo.SIZE),
    help="Length of the disk that is stored (default 256MiB).",
)
@click.option("--seed", type=int, default=1, help="Another one makes another disk (default 1).")
def _run_demo(session: Session, size: int, seed: int) -> None:
    """Show what imagestore does.

    In a temporary directory: needs no server and no configuration, and leaves nothing.
    """
    if size < _demo.SIZE_MIN:
        raise click.UsageError(f"the disk must have at least {human(_demo.SIZE_MIN)}")
    with tempfile.TemporaryDirectory(prefix="imagestore-demo-") as directory:
        began = time.monotonic()
        steps = _demo.run(Path(directory, "images"), size=size, seed=seed)
        done = _steps_as_json(session, steps) if session.json else _steps_as_table(steps)
        seconds = time.monotonic() - began
    wrong = sum(not step.ok for step in done)
    if session.json:
        session.emit({"ok": not wrong, "steps": len(done), "failed": wrong, "seconds": round(seconds, 3)})
    else:
        digest = next((step.values["sha256"] for step in done if "sha256" in step.values), None)
        _console(width=_width()).print(
            f"sha256 {digest}\n"
            + (f"{wrong} of {len(done)} steps failed" if wrong else f"all {len(done)} steps are as they should be")
            + f", {seconds:.1f} s",
            style="bold red" if wrong else "bold green",
        )
    session.code = int(bool(wrong))


def _steps_as_json(session: Session, steps: Iterable[_demo.Step]) -> list[_demo.Step]:
    done = []
    for step in steps:
        session.emit(dataclasses.asdict(step) | {"seconds": round(step.seconds, 3)})
        done.append(step)
    return done


def _width() -> int | None:
    return None if sys.stdout.isatty() else 100


def _steps_as_table(steps: Iterable[_demo.Step]) -> list[_demo.Step]:
    from rich import box
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    try:
        "✓✗".encode(sys.stdout.encoding or "ascii")
        good, bad = "✓", "✗"
    except (UnicodeEncodeError, LookupError):
        good, bad = "ok", "!!"
    table = Table(
        title="imagestore: an image goes in and out", title_style="bold", title_justify="left", box=box.ROUNDED
    )
    table.add_column("")
    table.add_column("step", style="bold", no_wrap=True)
    table.add_column("what happened", overflow="fold", min_width=46)
    table.add_column("s", justify="right", style="dim")
    console = _console(width=_width())
    done = []
    with Live(table, console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        for step in steps:
            mark = Text(good, "bold green") if step.ok else Text(bad, "bold red")
            detail = "\n".join(_safe(line) for line in step.detail.split("\n"))
            table.add_row(mark, step.name, Text(detail, "" if step.ok else "red"), f"{step.seconds:.2f}")
            if live is not None:
                live.refresh()
            done.append(step)
    if not console.is_terminal:
        console.print(table)
    return done
