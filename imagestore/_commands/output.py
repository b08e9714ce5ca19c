"""Values as text: for people, for pipes, as JSON. Nothing here drives a terminal that a stranger's name could."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import click

from imagestore._demo import human

__all__ = ["SIZES", "cell", "complain", "field", "finish", "plain", "print_fields", "safe", "to_json"]

SIZES: Final = frozenset({"size", "bytes", "stored", "free", "total"})
"""Names of values that are bytes."""


def safe(text: str) -> str:
    """``text`` without characters that would drive a terminal: names in a store come from strangers."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(value: Any) -> Any:
    """A value as JSON can hold it, for `json.dumps`."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def to_json(document: Mapping[str, Any]) -> str:
    """One document on one line."""
    return json.dumps(document, default=plain) + "\n"


def cell(column: str, value: Any) -> str:
    """A value for people."""
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
    if column in SIZES and value is not None:
        return human(value)
    return field(value) or "-"


def field(value: Any) -> str:
    """A value for a pipe: sizes in bytes, times in ISO 8601, nothing for what is not known."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return safe(str(plain(value)))


def print_fields(*fields: str) -> None:
    """Write a line of values."""
    sys.stdout.write((" " if sys.stdout.isatty() else "\t").join(fields) + "\n")


def complain(text: str) -> None:
    """Write a line, or several, to standard error."""
    lines = "\n".join(safe(line) for line in text.split("\n"))
    mark = "imagestore:"
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        mark = click.style(mark, fg="red", bold=True)
    sys.stderr.write(f"{mark} {lines}\n")


def finish() -> None:
    """Write what is buffered; if that can't be, drop it, or the interpreter would fail on it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
