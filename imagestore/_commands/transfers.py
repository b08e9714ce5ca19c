"""Where images move: add, get, copy, verify."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from imagestore import errors
from imagestore._commands import options
from imagestore._commands.completion import complete_file, complete_image, complete_store
from imagestore._commands.group import command, setting
from imagestore._commands.output import safe
from imagestore._commands.session import Session
from imagestore._commands.signals import cancelling, open_source
from imagestore._models import AddResult

__all__: list[str] = []

Pairs = tuple[tuple[str, str], ...]


@command("add")
@click.argument("image_id", metavar="ID")
@click.argument("file", shell_complete=complete_file)
@click.option(
    "--to",
    metavar="NAME",
    multiple=True,
    shell_complete=complete_store,
    help="The store to add to, as --store. Several times: to all of them, reading FILE once.",
)
@click.option(
    "--size", type=options.to_bytes, metavar="BYTES", help="Length of the image; one of another length is refused."
)
@options.digest
@options.expect
@options.disk_format
@options.container_format
@options.metadata
@options.progress
def _add(
    session: Session,
    image_id: str,
    file: str,
    to: tuple[str, ...],
    size: int | None,
    digest: tuple[str, ...],
    expect: Pairs,
    disk_format: str | None,
    container_format: str | None,
    metadata: Pairs,
) -> None:
    """Store FILE as image ID, whole or not at all.

    With - as FILE the image is read from standard input. The end of a pipe looks the same if the program that writes
    into it failed: name the --size, or a digest to --expect, if that could be.

    Of several stores each gets the image whole or not at all; one that fails does not keep the others, but makes the
    command fail at its end.
    """
    expected, kept = options.mapping(expect, "--expect"), options.mapping(metadata, "--metadata")
    if to and session.store is not None:
        raise click.UsageError("--to and --store both name the store: give one of them")
    names = to or (session.chosen().name,)
    began = time.monotonic()
    with cancelling(session) as cancel, open_source(file, cancel) as source, session.showing(image_id) as report:
        added = session.stores().add(
            image_id,
            source,
            to=names,
            size=size,
            digests=digest or ("sha256",),
            expected=expected,
            disk_format=disk_format,
            container_format=container_format,
            metadata=kept,
            progress=report,
            cancel=cancel,
        )
    seconds = time.monotonic() - began
    for result in added.results.values():
        _show_added(session, result, seconds, {"store": result.store} if len(names) > 1 else {})
    for error in added.errors.values():
        session.failed(error)
    where = f", in {len(added.results)} of {len(names)} stores" if len(names) > 1 else ""
    session.transferred("stored", next(iter(added.results.values())).size, seconds, where)


def _show_added(session: Session, result: AddResult, seconds: float, first: Mapping[str, str], **more: str) -> None:
    """``first`` stands before all else for people and pipes, ``more`` is told in JSON."""
    session.show(
        {**first, "location": result.location.uri, "size": result.size, "stored": result.stored, **result.digests},
        {
            "image_id": result.image_id,
            "store": result.store,
            "location": result.location.uri,
            "size": result.size,
            "stored": result.stored,
            "digests": result.digests,
            "version": result.stat.version,
            "seconds": round(seconds, 3),
            **more,
        },
    )


@command("copy")
@click.argument("image", shell_complete=complete_image)
@click.option("--to", metavar="NAME", required=True, shell_complete=complete_store, help="The store to copy to.")
@click.option(
    "--from",
    metavar="NAME",
    expose_value=False,
    callback=setting("store"),
    shell_complete=complete_store,
    help="The store that has IMAGE, as --store.",
)
@click.option("--id", "image_id", metavar="ID", help="The id of the copy (default: that of IMAGE).")
@options.expect
@options.metadata
@options.progress
def _copy(session: Session, image: str, to: str, image_id: str | None, expect: Pairs, metadata: Pairs) -> None:
    """Copy IMAGE into another store, whole or not at all.

    Where the backend can do that by itself the bytes stay there, and no digest is told; --expect makes them come here
    and be compared.
    """
    expected, kept = options.mapping(expect, "--expect"), options.mapping(metadata, "--metadata")
    stores = session.stores()
    _ = stores[to]
    store, location = session.find(image)
    began = time.monotonic()
    with cancelling(session) as cancel, session.showing(location.image_id or location.uri) as report:
        result = stores.copy(
            location,
            to,
            image_id=image_id,
            source=store.name,
            expected=expected,
            metadata=kept,
            progress=report,
            cancel=cancel,
        )
    seconds = time.monotonic() - began
    _show_added(session, result, seconds, {}, source=location.uri)
    session.transferred("copied", result.size, seconds, f", from {store.name} to {to}")


@command("get")
@click.argument("image", shell_complete=complete_image)
@click.argument("file", shell_complete=complete_file)
@click.option(
    "--or",
    "others",
    metavar="LOCATION",
    multiple=True,
    help="Another copy of the image, to be read if those before fail. May be given several times.",
)
@click.option("--start", type=options.to_bytes, metavar="BYTES", default="0", help="The first byte to get (default 0).")
@click.option("--stop", type=options.to_bytes, metavar="BYTES", help="The first byte not to get (default: the end).")
@options.expect
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@options.progress
def _get(
    session: Session,
    image: str,
    file: str,
    others: tuple[str, ...],
    start: int,
    stop: int | None,
    expect: Pairs,
    force: bool,
) -> None:
    """Read IMAGE into FILE.

    FILE appears when it is complete and as expected, and has holes where the image has nothing but zeros. With - as
    FILE the image goes to standard output, and can be checked only at its end: look at the exit code.

    With --or another copy takes over if nothing could be read yet; with --expect also later, if it has the same size.
    """
    from imagestore._download import Target

    expected = options.mapping(expect, "--expect")
    partial = bool(start) or stop is not None
    if partial and expected:
        raise click.UsageError("--expect is of a whole image, not of a range")
    if others and (session.store is not None or "://" not in image):
        raise click.UsageError("with --or, all copies are given by their locations, and --store is not")
    if file != "-":
        _check_target(file, force)
    elif sys.stdout.isatty() and not force:
        raise click.UsageError("an image would garble the terminal: give a file or a pipe, or --force")
    store, location = session.find(image)
    opened = functools.partial(
        functools.partial(session.stores().get, [location, *others])
        if others
        else functools.partial(store.get, location),
        start=start,
        stop=stop,
        expected=expected,
    )
    digests: Mapping[str, str] = expected
    began = time.monotonic()
    with session.showing(location.image_id or location.uri) as report:
        if file == "-":
            # A write that waits for its reader could not be cancelled; an exception breaks it off.
            with opened(progress=report) as reader:
                for chunk in reader:
                    sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
                size = reader.size
        elif partial or others:
            with (
                cancelling(session) as cancel,
                opened(progress=report, cancel=cancel) as reader,
                Target(file, overwrite=force) as target,
            ):
                size = 0
                for chunk in reader:
                    target.write(chunk, size)
                    size += len(chunk)
                target.publish(size)
        else:
            with cancelling(session) as cancel:
                result = store.download(
                    location, file, expected=expected, overwrite=force, progress=report, cancel=cancel
                )
            size, digests = result.size, result.digests
    seconds = time.monotonic() - began
    document: dict[str, Any] = {
        # Which of several copies was read is known to nobody.
        "store": None if others else store.name,
        "location": None if others else location.uri,
        "file": file,
        "size": size,
        "digests": digests,
        "seconds": round(seconds, 3),
    }
    if file != "-":
        session.show({"file": file, "size": size, **digests}, document)
    elif session.json:
        session.emit(document, err=True)
    session.transferred("got", size, seconds)


def _check_target(file: str, force: bool) -> None:
    if not os.path.lexists(file):
        return
    if not os.path.isfile(file):
        raise click.UsageError(
            f"{safe(file)} is not a regular file; to write into a device or a pipe: imagestore get IMAGE - > FILE"
        )
    if not force:
        raise errors.AlreadyExists(f"the file {safe(file)} exists; --force replaces it", operation="get")


@command("verify")
@click.argument("image", shell_complete=complete_image)
@options.digest
@options.expect
@options.progress
def _verify(session: Session, image: str, digest: tuple[str, ...], expect: Pairs) -> None:
    """Read all of IMAGE and tell its digests.

    Fails if one is not as expected.
    """
    expected = options.mapping(expect, "--expect")
    store, location = session.find(image)
    began = time.monotonic()
    with session.showing(location.image_id or location.uri) as report:
        result = store.verify(
            location, expected=expected, digests=digest or (() if expected else ("sha256",)), progress=report
        )
    seconds = time.monotonic() - began
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
    session.transferred("read", result.size, seconds, agreed)
