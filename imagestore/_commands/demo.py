"""demo: what imagestore does, on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from imagestore import _demo
from imagestore._commands.group import command
from imagestore._commands.options import to_bytes
from imagestore._commands.output import safe
from imagestore._commands.session import Session
from imagestore._demo import human

if TYPE_CHECKING:
    from imagestore._commands.terminal import Console

__all__: list[str] = []


@command("demo")
@click.option(
    "--size",
    type=to_bytes,
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
        done = _as_json(session, steps) if session.json else _as_table(steps)
        seconds = time.monotonic() - began
    wrong = sum(not step.ok for step in done)
    if session.json:
        session.emit({"ok": not wrong, "steps": len(done), "failed": wrong, "seconds": round(seconds, 3)})
    else:
        digest = next((step.values["sha256"] for step in done if "sha256" in step.values), None)
        verdict = f"{wrong} of {len(done)} steps failed" if wrong else f"all {len(done)} steps are as they should be"
        _console().print(f"sha256 {digest}\n{verdict}, {seconds:.1f} s", style="bold red" if wrong else "bold green")
    session.code = int(bool(wrong))


def _as_json(session: Session, steps: Iterable[_demo.Step]) -> list[_demo.Step]:
    done = []
    for step in steps:
        session.emit(dataclasses.asdict(step) | {"seconds": round(step.seconds, 3)})
        done.append(step)
    return done


def _console() -> Console:
    from imagestore._commands.terminal import Console

    return Console(width=None if sys.stdout.isatty() else 100)


def _as_table(steps: Iterable[_demo.Step]) -> list[_demo.Step]:
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
    console = _console()
    done = []
    with Live(table, console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        for step in steps:
            mark = Text(good, "bold green") if step.ok else Text(bad, "bold red")
            detail = "\n".join(safe(line) for line in step.detail.split("\n"))
            table.add_row(mark, step.name, Text(detail, "" if step.ok else "red"), f"{step.seconds:.2f}")
            if live is not None:
                live.refresh()
            done.append(step)
    if not console.is_terminal:
        console.print(table)
    return done
