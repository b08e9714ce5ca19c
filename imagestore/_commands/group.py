"""The program itself: global options, help, logging, and that every failure ends as a line and an exit code."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import click

from imagestore._commands.completion import complete_file, complete_store
from imagestore._commands.output import complain, finish
from imagestore._commands.session import CLOSED, CONFIG_FILES, EXIT_CODES, Session
from imagestore._config_files import CONFIG_VARIABLE
from imagestore.errors import redact

__all__ = ["cli", "command", "setting"]

_log = logging.getLogger("imagestore")


class _Group(click.Group):
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
            session.code = CLOSED
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - one line for the user, whatever it is
            session.failed(error)
        finish()
        ctx.exit(session.code)


_ADDED_UP: Final = frozenset({"config", "verbose"})


def setting(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A callback for options that set an attribute of the session. It may be given by several options."""

    def callback(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        session = ctx.ensure_object(Session)
        if value:
            setattr(session, name, getattr(session, name) + value if name in _ADDED_UP else value)

    return callback


def _global_options() -> list[click.Option]:
    """May stand before the command or after it."""

    def option(name: str, *names: str, **settings: Any) -> click.Option:
        return click.Option([*names, f"--{name}"], expose_value=False, callback=setting(name), **settings)

    return [
        option(
            "config",
            metavar="FILE",
            multiple=True,
            shell_complete=complete_file,
            help="A configuration file, or a directory of them.",
        ),
        option(
            "store",
            metavar="NAME",
            shell_complete=complete_store,
            help="The store to use, not the default one or that of a location.",
        ),
        option("json", is_flag=True, is_eager=True, help="Results and errors as JSON; a document per line for lists."),
        option("verbose", "-v", count=True, help="Tell more of what happens; -vv also where an error came from."),
    ]


def _epilog() -> str:
    codes = [(0, "done"), (1, "any other failure; a check found faults"), *((c, text) for c, text, _ in EXIT_CODES)]
    codes.append((CLOSED, "standard output was closed before the end"))
    lines = "\n".join(f"  {code:<4} {text}" for code, text in codes)
    return (
        "Configuration files are looked for in --config, the environment variable "
        f"{CONFIG_VARIABLE} (with colons between them), and then the first of {', '.join(CONFIG_FILES)}. "
        "The options above may also stand after a command.\n\n"
        "Results are tables on a terminal, and lines of values with tabs between them in a pipe.\n\n"
        f"\b\nExit codes:\n{lines}\n\n"
        "\b\nShell completion (bash; zsh_source and fish_source alike):\n"
        '  eval "$(_IMAGESTORE_COMPLETE=bash_source imagestore)"'
    )


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_epilog(),
)
@click.version_option(package_name="imagestore", prog_name="imagestore")
def cli() -> None:
    """Puts virtual-machine images into any storage, whole and verified, and gets them back.

    An IMAGE is an image id, looked for in the default store or the one of --store, or a location (a URI).
    """


cli.params += _global_options()


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function, which takes the `Session` first, a command of the program."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(session: Session, /, **arguments: Any) -> None:
            with _logging(session), contextlib.closing(session):
                function(session, **arguments)

        made = cli.command(name)(click.pass_obj(run))
        made.params += _global_options()
        return made

    return decorate


class _LogHandler(logging.Handler):
    """Writes what the library tells to wherever standard error is at that moment."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        text, level = redact(record.getMessage()), record.levelname.lower()
        if self._session.json:
            self._session.emit({"level": level, "message": text}, err=True)
        else:
            complain(f"{level}: {text}")


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
