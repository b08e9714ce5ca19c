"""check-config: faults of a configuration, and whether it still reaches what an old database names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any

import click

from imagestore import errors
from imagestore._commands.completion import complete_file
from imagestore._commands.group import command
from imagestore._commands.output import print_fields, safe
from imagestore._commands.session import Session
from imagestore._stores import Stores
from imagestore.driver import split_credentials
from imagestore.errors import redact

__all__: list[str] = []


@command("check-config")
@click.argument("files", metavar="[FILE]...", nargs=-1, shell_complete=complete_file)
@click.option("--connect", is_flag=True, help="If there is no fault, also open every store.")
@click.option(
    "--locations",
    type=click.File("r", encoding="utf-8", errors="backslashreplace"),
    metavar="FILE",
    help="If there is no fault, also tell which store serves each location in FILE (- is standard input).",
)
def _check_config(session: Session, files: tuple[str, ...], connect: bool, locations: IO[str] | None) -> None:
    """Tell every fault of the configuration.

    Each by file, section and option; the exit code is 1 if there are any.

    A file of --locations has one URI per line; blank lines and those that begin with # are skipped. For each its line,
    the store, the location (without credentials) and, if there is no store, the reason are told. The exit code is 1
    if any has none.
    """
    session.config = files or session.files()
    if _faults(session):
        return
    if connect:
        _connect(session)
    if locations is not None:
        _owners(session, locations)
    if not connect and locations is None:
        session.say(f"no fault in {', '.join(session.config)}")


def _faults(session: Session) -> bool:
    from imagestore.config import check

    problems = check(session.config)
    for problem in problems:
        if session.json:
            session.emit(
                {
                    "error": problem.error.__name__,
                    "message": problem.message,
                    "file": problem.file,
                    "line": problem.line,
                    "section": problem.section,
                    "option": problem.option,
                }
            )
        else:
            print_fields(safe(str(problem)))
    if problems:
        session.code = 1
        session.say(f"{len(problems)} fault{'s' * (len(problems) > 1)}")
    return bool(problems)


def _connect(session: Session) -> None:
    for store in session.stores().values():
        try:
            _ = store.capabilities
        except errors.StoreError as error:
            session.failed(error)
            session.code = 1
        else:
            if session.json:
                session.emit({"store": store.name, "type": store.driver_name, "connected": True})
            else:
                print_fields(safe(store.name), "ok")


def _owners(session: Session, lines: Iterable[str]) -> None:
    owned: Counter[str | None] = Counter()

    def counted() -> Iterator[dict[str, Any]]:
        for row in _owner_of_each(session.stores(), lines):
            owned[row["store"]] += 1
            yield row

    session.rows(("line", "store", "location", "reason"), counted())
    without = owned.pop(None, 0)
    session.code = session.code or int(bool(without))
    if session.json:
        session.emit({"locations": owned.total() + without, "without_store": without, "stores": owned})
        return
    served = ", ".join(f"{count} in {name}" for name, count in owned.items()) or "none in any store"
    session.sum_up(
        f"{owned.total() + without} locations: {served}" + (f", {without} without a store" if without else "")
    )


def _owner_of_each(stores: Stores, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        uri = line.strip()
        if not uri or uri.startswith("#"):
            continue
        row: dict[str, Any] = {"line": number, "store": None, "location": _bare(uri), "image_id": None, "reason": None}
        try:
            store = stores.for_location(uri)
            location = store.parse(uri)
        except errors.InvalidLocation:
            row["reason"] = _why_not(stores, uri)
        else:
            row |= {"store": store.name, "location": location.uri, "image_id": location.image_id}
        yield row


def _why_not(stores: Stores, uri: str) -> str:
    """Each reason once, with the stores that it is of."""
    reasons: dict[str, list[str]] = {}
    for store in stores.values():
        try:
            store.parse(uri)
        except errors.InvalidLocation as error:
            reasons.setdefault(error.message, []).append(store.name)
    if len(reasons) == 1:
        return next(iter(reasons))
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())


def _bare(uri: str) -> str:
    """``uri`` so that it can be shown: here all of the text is one URI, so that no blank ends what is cut."""
    try:
        return redact(split_credentials(uri))
    except errors.InvalidLocation:
        return redact(uri.rpartition("@")[2])
