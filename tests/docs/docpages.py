"""The code blocks of a page of the documentation, and what it takes to run them in order.

A page says in comments, which readers don't see, what the blocks leave out::

    <!-- not run: reason -->     the next block is not run, for that reason
    <!-- file: stores.conf -->   the next block is written to that file
    <!-- exit: 1 -->             the next block's last command ends with that code
    <!-- setup
    ...                          Python that the reader needs no more: files to work on, servers
    -->

`REPOSITORY` is known in Python blocks: where the checkout is.
"""

from __future__ import annotations

import doctest
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagestore import config

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"

FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|:{3,})(?P<info>[^`]*)")
COMMENT = re.compile(r"<!-- (not run|file|exit): (.+?) -->")
SHOWN = {"", "text", "diff"}
"""Blocks to look at."""
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
PATIENCE = 120


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block: its language, text, line (from 1), and what the comment before it says."""

    language: str
    text: str
    line: int
    says: dict[str, str]

    @property
    def runs(self) -> bool:
        return not self.language.startswith("{") and self.language not in SHOWN and "not run" not in self.says


class Wrong(AssertionError):
    """A block did not do what the page says."""


def pages() -> list[Path]:
    return sorted(path for path in DOCS.rglob("*.md") if not {"_build", "examples", "images"} & {*path.parts})


def blocks(text: str) -> Iterator[Block]:
    """The blocks and hidden set-ups of a page, in order."""
    lines = text.splitlines()
    number = 0
    says: dict[str, str] = {}
    while number < len(lines):
        line = lines[number]
        number += 1
        if comment := COMMENT.fullmatch(line.strip()):
            says[comment[1]] = comment[2]
        elif line.strip() == "<!-- setup":
            start = number
            while lines[number].strip() != "-->":
                number += 1
            yield Block(language="python", text="\n".join(lines[start:number]), line=start + 1, says={})
            number += 1
        elif fence := FENCE.fullmatch(line):
            start = number
            while lines[number].strip() != fence["fence"]:
                number += 1
            indent = len(fence["indent"])
            inside = "\n".join(each[indent:] for each in lines[start:number])
            yield Block(language=fence["info"].strip(), text=inside, line=start + 1, says=says)
            says = {}
            number += 1
        elif line.strip() and says:
            raise Wrong(f"line {number - 1}: the comment stands before no block: {says}")


class Page:
    """Runs the blocks of one page, one after the other, in the current directory and with one Python namespace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, Any] = {"__name__": "page", "REPOSITORY": REPOSITORY}
        tools = str(Path(sys.executable).parent)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("IMAGESTORE_", "PYTEST", "COV"))
        } | {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": os.getcwd(), "LC_ALL": "C.UTF-8", "COLUMNS": "80"}

    def run(self) -> int:
        """Run all blocks; how many were run."""
        count = 0
        for block in blocks(self.path.read_text("utf-8")):
            if not block.runs:
                continue
            runner = getattr(self, f"_{block.language}", None)
            if runner is None:
                raise Wrong(f"{self._place(block)}: nobody can run {block.language!r}; 'text' is for what is shown")
            try:
                runner(block)
            except Wrong:
                raise
            except Exception as error:
                raise Wrong(f"{self._place(block)}: {type(error).__name__}: {error}") from error
            count += 1
        return count

    def _place(self, block: Block) -> str:
        return f"{self.path}:{block.line}"

    def _python(self, block: Block) -> None:
        # With its place in the file, so that a traceback shows the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(self.path), "exec")
        exec(code, self.names)

    def _pycon(self, block: Block) -> None:
        test = doctest.DocTestParser().get_doctest(
            block.text + "\n", {}, self.path.name, str(self.path), block.line - 1
        )
        test.globs = self.names
        told = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=OPTIONS)
        if runner.run(test, out=told.write, clear_globs=False).failed:
            raise Wrong(f"{self._place(block)}:\n{told.getvalue()}")

    def _ini(self, block: Block) -> None:
        """A configuration of stores, or a part of one: it has no fault."""
        text = block.text + "\n"
        if "enabled_backends" not in text:
            text = f"[DEFAULT]\nenabled_backends = page:file\n[page]\ndatadir = /srv/page\n{text}"
        file = Path(block.says.get("file", "page.conf"))
        file.write_text(text, "utf-8")
        problems = config.check([file])
        if problems:
            raise Wrong(f"{self._place(block)}: " + "; ".join(map(str, problems)))

    def _toml(self, block: Block) -> None:
        tomllib.loads(block.text)

    def _json(self, block: Block) -> None:
        json.loads(block.text)

    def _sh(self, block: Block) -> None:
        code, told, complained = self._shell(block.text)
        if code != int(block.says.get("exit", 0)):
            raise Wrong(f"{self._place(block)}: exit code {code}\n{told}{complained}")

    _bash = _sh

    def _console(self, block: Block) -> None:
        """Commands after ``$ `` (and ``> `` where they go on), each followed by what it writes; ``...`` is anything."""
        steps: list[tuple[str, list[str]]] = []
        for line in block.text.splitlines():
            if line.startswith("$ "):
                steps.append((line[2:], []))
            elif line.startswith("> ") and steps and not steps[-1][1]:
                steps[-1] = (f"{steps[-1][0]}\n{line[2:]}", [])
            elif steps:
                steps[-1][1].append(line)
            else:
                raise Wrong(f"{self._place(block)}: a command begins with '$ '")
        for number, (command, expected) in enumerate(steps, 1):
            code, told, complained = self._shell(command)
            wanted = int(block.says.get("exit", 0)) if number == len(steps) else 0
            text = "\n".join(expected) + "\n" if expected else ""
            # A page may leave out what goes to standard error while all is well.
            possible = (told + complained,) if code else (told, told + complained)
            if code != wanted or not any(
                doctest.OutputChecker().check_output(text, each, OPTIONS) for each in possible
            ):
                raise Wrong(
                    f"{self._place(block)}: {command}\nexit code {code}, expected {wanted}\n"
                    f"{told}{complained}\ninstead of\n{text}"
                )

    def _shell(self, command: str) -> tuple[int, str, str]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr
