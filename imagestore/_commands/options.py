"""Values and options that several commands take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Final

import click

from imagestore._commands.group import setting
from imagestore._commands.session import PROGRESS

__all__ = [
    "container_format",
    "digest",
    "disk_format",
    "expect",
    "mapping",
    "metadata",
    "progress",
    "to_age",
    "to_bytes",
]

_BYTES: Final = re.compile(r"(\d+)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)
_AGE: Final = re.compile(r"(\d{1,9})([smhd]?)")


def to_bytes(text: str) -> int:
    """A number of bytes, for click."""
    match = _BYTES.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a number of bytes, such as 4096, 512MiB or 10GB")
    base = 1024 if match[3] else 1000
    size: int = int(match[1]) * base ** " kmgt".index((match[2] or " ").lower())
    return size


def to_age(text: str) -> timedelta:
    """An age, for click."""
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


def mapping(pairs: Sequence[tuple[str, str]], option: str) -> dict[str, str]:
    """Pairs by their first part, which may be given twice only with the same second."""
    found: dict[str, str] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise click.UsageError(f"{option} is given twice for {name}")
    return found


expect = click.option(
    "--expect",
    type=_pair(":", "sha256:HEX"),
    metavar="NAME:HEX",
    multiple=True,
    help="Fail unless the image has this digest, such as sha256:HEX. May be given several times.",
)
digest = click.option(
    "--digest",
    metavar="NAME",
    multiple=True,
    help="A digest to compute, such as md5 or sha512 (default sha256). May be given several times.",
)
disk_format = click.option(
    "--disk-format", metavar="NAME", help="What the disk is declared to be, such as qcow2; a lie is refused."
)
container_format = click.option(
    "--container-format", metavar="NAME", help="What it is packed in, such as bare or ova (default bare)."
)
metadata = click.option(
    "--metadata",
    type=_pair("=", "NAME=VALUE"),
    metavar="NAME=VALUE",
    multiple=True,
    help="Kept with the image where the backend can.",
)
progress = click.option(
    "--progress",
    type=click.Choice(PROGRESS),
    expose_value=False,
    callback=setting("progress"),
    help="auto: a bar on a terminal, else one line at the end. plain: a line every few seconds. none: nothing.",
)
