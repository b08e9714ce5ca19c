"""What only a terminal gets, with rich: tables and the progress bar. Imported when it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from rich import box, console, progress
from rich.table import Column, Table
from rich.text import Text

from imagestore._commands.output import SIZES
from imagestore._demo import human
from imagestore._models import Progress

__all__ = ["Console", "bar", "print_list", "print_pairs"]

_NUMBERS: Final = SIZES | {"line", "weight"}
_LONG: Final = frozenset({"image_id", "token", "location", "description", "package", "reason"})


class Console(console.Console):
    """Writes texts as they are: what stands in brackets or between colons in a name has no meaning."""

    def __init__(self, *, err: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=err, highlight=False, markup=False, emoji=False, width=width)

    def on_broken_pipe(self) -> None:
        """Leave it to whoever wrote."""
        raise  # noqa: PLE0704 - rich calls this while it handles the error


def print_list(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> int:
    """Write a table with a head, unless there are no rows, and return their number."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.replace("_", " "),
            justify="right" if column in _NUMBERS else "left",
            overflow="fold",
            no_wrap=column not in _LONG,
        )
    for row in rows:
        table.add_row(*row)
    if table.rows:
        Console().print(table)
    return len(table.rows)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Write names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for pair in pairs:
        table.add_row(*pair)
    Console().print(table)


class _Rate(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{human(speed)}/s" if speed else "")


@contextlib.contextmanager
def bar(title: str) -> Iterator[Progress]:
    """A progress bar on standard error, gone at its end."""
    shown = progress.Progress(
        progress.TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=36)),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(binary_units=True),
        _Rate(),
        progress.TimeRemainingColumn(),
        console=Console(err=True),
        transient=True,
        # A slow transfer stores a block only every now and then, and two are needed for a rate.
        speed_estimate_period=90,
        redirect_stdout=False,
    )
    with shown:
        task = shown.add_task(title, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
