"""What a shell offers when Tab is pressed. It must be quick and silent: whatever fails offers nothing."""

from __future__ import annotations

import contextlib
import io
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Final

import click
from click.shell_completion import CompletionItem

from imagestore._commands.session import Session
from imagestore._demo import human

__all__ = ["complete_file", "complete_image", "complete_store"]

LONGEST: Final = 2.0
"""Seconds after which what was found so far is offered."""
MOST: Final = 200


class _Late(BaseException):
    """Passes through everything that handles errors, retries included."""


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    def late(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        # What is logged or warned of would stand in the middle of the user's line.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception, _Late):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


Found = Callable[[Session], Iterator[tuple[str, str]]]


def _complete(ctx: click.Context, incomplete: str, find: Found) -> list[CompletionItem]:
    offered: list[CompletionItem] = []
    with _quickly(), contextlib.closing(ctx.ensure_object(Session)) as session:
        matching = (pair for pair in find(session) if pair[0].startswith(incomplete))
        for name, about in itertools.islice(matching, MOST):
            offered.append(CompletionItem(name, help=about))
    return offered


def complete_store(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of stores in the configuration."""
    return _complete(
        ctx,
        incomplete,
        lambda session: ((store.name, store.description or store.driver_name) for store in session.stores().values()),
    )


def complete_image(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of images in the store of ``--store``, or the default one: not all, if there are many or it is slow."""
    return _complete(
        ctx,
        incomplete,
        lambda session: (
            (image.image_id, "" if image.size is None else human(image.size)) for image in session.chosen().list()
        ),
    )


def complete_file(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and directories, by the shell itself."""
    return [CompletionItem(incomplete, type="file")]
