"""What an image is: inspect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from imagestore._commands import options
from imagestore._commands.completion import complete_file
from imagestore._commands.group import command
from imagestore._commands.session import Session
from imagestore._commands.signals import cancelling, open_source
from imagestore._demo import human
from imagestore._source import open_source as open_blocks
from imagestore._store import Store
from imagestore.errors import ConfigurationError

if TYPE_CHECKING:
    from imagestore.formats import Inspection, Policy

__all__: list[str] = []

_BLOCK = 1 << 20
_REFUSED = 1


@command("inspect")
@click.argument("image", metavar="FILE|LOCATION|-", shell_complete=complete_file)
@options.disk_format
@options.container_format
@options.progress
def _inspect(session: Session, image: str, disk_format: str | None, container_format: str | None) -> None:
    """Say what an image is, and whether it would be accepted.

    A file, standard input (-), or a location such as https://host/path, which needs a configuration unless it is
    one of http. The policy is that of the configuration, if there is one. The exit code is 0 if the image would be
    accepted as declared, and 1 if it would be refused.
    """
    with session.showing("inspecting") as progress, cancelling(session) as cancel:
        if "://" in image:
            with _store(session, image) as store:
                found = store.inspect(
                    image,
                    disk_format=disk_format,
                    container_format=container_format,
                    progress=progress,
                    cancel=cancel,
                )
        else:
            from imagestore.formats import inspect_stream

            with open_source(image, cancel) as source:
                blocks = open_blocks(source)
                found = inspect_stream(
                    iter(lambda: blocks.block(_BLOCK), b""),
                    disk_format=disk_format,
                    container_format=container_format,
                    policy=_policy(session),
                )
    _show(session, found)
    if not found.accepted:
        session.code = _REFUSED


def _policy(session: Session) -> Policy | None:
    """That of the configuration, which is the same for all stores; None if there is no configuration."""
    try:
        stores = session.stores()
    except ConfigurationError:
        if session.config:
            raise
        return None
    return next((store.policy for store in stores.values()), None)


@contextmanager
def _store(session: Session, location: str) -> Iterator[Store]:
    """The configured store that serves a location; for the web one of its own, if none is configured."""
    from imagestore.config import open_store

    web = location.partition("://")[0].lower() in {"http", "https"}
    try:
        store = session.chosen() if session.store is not None else session.stores().for_location(location)
    except ConfigurationError:
        if not web or session.store is not None or session.config:
            raise
        with open_store("http") as store:
            yield store
    else:
        yield store


def _show(session: Session, found: Inspection) -> None:
    if session.json:
        session.emit(dataclasses.asdict(found))
        return
    size = "unknown" if found.virtual_size is None else f"{human(found.virtual_size)} ({found.virtual_size:,} bytes)"
    session.show(
        {
            "verdict": "accepted" if found.accepted else "refused",
            "disk format": found.disk_format or "unknown",
            "container format": found.container_format,
            "recognised": ", ".join(found.formats) or "nothing",
            "size": found.size,
            "virtual size": size,
            "verified": found.verified,
        },
        {},
    )
    rows: list[dict[str, Any]] = [
        {
            "severity": finding.severity,
            "finding": finding.code,
            "offset": finding.offset,
            "member": finding.member,
            "message": finding.message,
        }
        for finding in found.findings
    ]
    if rows:
        columns = ["severity", "finding", "offset", "message"]
        if any(row["member"] for row in rows):
            columns.insert(3, "member")
        session.rows(columns, rows)
