"""What is there: stores, images, unfinished uploads; and to be rid of it."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any, Final

import click

from imagestore import errors
from imagestore._commands.completion import complete_image
from imagestore._commands.group import command
from imagestore._commands.options import to_age
from imagestore._commands.output import print_fields, safe
from imagestore._commands.session import Session
from imagestore._demo import human
from imagestore._models import Leftover
from imagestore._store import Store

__all__: list[str] = []

_VERBS: Final = ("create", "delete", "list", "uploads", "discard", "usage", "copy", "sign", "set_acls", "bind")
_LEFTOVER: Final = ("token", "image_id", "bytes", "last_activity", "alive")


@command("stat")
@click.argument("image", shell_complete=complete_image)
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


@command("list")
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


@command("delete")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, shell_complete=complete_image)
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
            if session.json:
                session.emit({"image": image, "store": store.name, "location": location.uri, "deleted": True})
            else:
                print_fields("deleted", safe(location.uri))


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


@command("uploads")
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


@command("collect")
@click.option(
    "--older-than",
    type=to_age,
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


@command("stores")
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
