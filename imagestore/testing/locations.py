"""Part five: a location comes from a stranger, and reaches nothing that its store was not configured for.

PYTEST_DONT_REWRITE: to compare megabytes is quick, to explain how they differ is not.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator
from typing import Final

from imagestore.driver import Location
from imagestore.errors import InvalidImageId, InvalidLocation, NotFound, StoreError
from imagestore.testing._kit import Kit, raises
from imagestore.testing._registry import check

__all__: list[str] = []

WRITER: Final = ("create", "locate", "delete")

SECRET: Final = "s3cr3t-of-the-kit"  # noqa: S105 - looked for in what must not have it

ODD: Final = (
    "..", "../", "/..", "//", "/./", "%2e%2e", "%2F", "%00", "\0", "\n", "\r\n", "\t", " ", "?", "#", "@", ":", ";",
    "&", "\\", "|", "*", "~", "$HOME", "`id`", "{}", "é", "\u202e", "\ud800", "\uff0e", "a" * 300, "x@y:z", "://",
)  # fmt: skip


@check("locations")
def round_trip(kit: Kit) -> None:
    """A canonical location stays what it is, wherever it comes from, and its scheme is the driver's."""
    data = kit.data(0.5)
    location = kit.image(data)
    again = kit.plain.parse(location.uri)
    assert again.uri == location.uri, f"{again.uri} instead of {location.uri}"
    assert kit.plain.parse(again) == again
    scheme = location.uri.partition("://")[0]
    assert scheme in kit.harness.make_driver().schemes
    upper = scheme.upper() + location.uri[len(scheme) :]
    assert kit.plain.parse(upper).uri == location.uri, "schemes are the same in capitals (RFC 3986, 3.1)"
    assert kit.read(upper) == data
    assert location.uri.isprintable()


@check("locations")
def pure_parse(kit: Kit) -> None:
    """``parse`` works before ``open``: it does no I/O."""
    location = kit.image(kit.data(0.1))
    assert kit.harness.make_driver().parse(location.uri).uri == location.uri


@check("locations")
def not_locations(kit: Kit) -> None:
    """What is no location, or one of another kind of store, is refused."""
    scheme = kit.harness.make_driver().schemes[0]
    for text in (
        "",
        "plain-id",
        "://",
        f"{scheme}",
        f"{scheme}:",
        f"{scheme}://",
        f"{scheme}:x",
        f" {scheme}://x",
        f"x{scheme}://x",
        "nothing-like-this://host/image",
        "javascript:alert(1)",
        "data:,x",
        f"{scheme}://" + "x" * 5000,
    ):
        with raises(InvalidLocation):
            kit.plain.parse(text)
        for ask in (kit.plain.get, kit.plain.stat, kit.plain.get_size):
            with raises(InvalidLocation):
                ask(text)


@check("locations")
def hostile(kit: Kit) -> None:
    """Locations outside of what the store was configured for are refused by every verb, and nothing is touched."""
    locations = list(kit.harness.hostile_locations())
    assert locations, "the harness knows no hostile locations"
    with kit.harness.canary():
        asks: list[Callable[[str], object]] = [kit.plain.stat, kit.plain.get, kit.plain.get_size]
        if "delete" in kit.verbs:
            asks.append(kit.plain.delete)
        for text in locations:
            for ask in asks:
                try:
                    ask(text)
                except InvalidLocation:
                    continue
                except StoreError as error:
                    raise AssertionError(f"{text!r}: {type(error).__name__} instead of InvalidLocation") from error
                raise AssertionError(f"{text!r} was accepted")


@check("locations")
def mutated(kit: Kit) -> None:
    """A location that somebody has changed is refused, or finds nothing, or still is the same image."""
    data = kit.data(0.2)
    location = kit.image(data)
    rng = random.Random(20)  # noqa: S311 - reproducible
    start = location.uri.index("://") + 3
    with kit.harness.canary():
        for _ in range(300):
            text = list(location.uri)
            for _ in range(rng.randint(1, 3)):
                place = rng.randint(start, len(text))
                stop = place + rng.choice((0, 0, 1, 5))
                text[place:stop] = rng.choice(ODD)
            _harmless(kit, "".join(text), location, data)


def _harmless(kit: Kit, text: str, original: Location, data: bytes) -> None:
    try:
        parsed = kit.plain.parse(text)
    except InvalidLocation:
        return
    assert parsed.uri.isprintable(), f"{text!r} became {parsed.uri!r}"
    assert kit.plain.parse(parsed.uri).uri == parsed.uri, f"{text!r} became {parsed.uri!r}, which is not canonical"
    try:
        stat = kit.plain.stat(text)
    except (NotFound, InvalidLocation):
        return
    assert parsed.uri == original.uri, f"{text!r} reached something: {stat}"
    assert kit.read(text) == data


@check("locations")
def credentials(kit: Kit) -> None:
    """Credentials in a location are cut before anything looks at them, and come out nowhere."""
    location = kit.image(kit.data(0.2))
    scheme, _, rest = location.uri.partition("://")
    with _log() as logged:
        for userinfo in (f"user:{SECRET}@", f"{SECRET}@", f"us@er:{SECRET}/+@", f":{SECRET}@", f"user:{SECRET}?x=@"):
            for tail in (rest, rest + "-not-there", "nonsense"):
                text = f"{scheme}://{userinfo}{tail}"
                try:
                    parsed = kit.plain.parse(text)
                    assert SECRET not in repr(parsed) + str(parsed) + parsed.uri + "".join(parsed.key)
                    kit.plain.stat(text)
                except StoreError as error:
                    _silent(error)
    assert not [line for line in logged if SECRET in line], "a credential in the log"


@contextlib.contextmanager
def _log() -> Iterator[list[str]]:
    """All that anybody logs meanwhile."""
    lines: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]  # a handler of one line
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def _silent(error: BaseException | None) -> None:
    while error is not None:
        told = f"{error!r} {error} {getattr(error, 'location', '')} {error.args!r}"
        assert SECRET not in told, f"a credential in {type(error).__name__}: {told.replace(SECRET, '<the secret>')}"
        error = error.__cause__ or error.__context__


@check("locations", *WRITER)
def ids_in_locations(kit: Kit) -> None:
    """Images of different ids have different locations; ids that differ in little are not mixed up."""
    base = kit.new_id()
    ids = [base, base + ".", base + "-", base + "..", base.upper(), base + ".part", base + ".tmp", "x" + base]
    locations: dict[str, str] = {}
    for image_id in ids:
        try:
            location = kit.add(kit.use_id(image_id), image_id.encode()).location
        except InvalidImageId:
            assert "check_id" in kit.verbs, f"{image_id!r} was refused, but the driver has no check_id"
            continue
        assert location.uri not in locations, f"{image_id} and {locations[location.uri]} share a location"
        locations[location.uri] = image_id
    for uri, image_id in locations.items():
        assert kit.read(uri) == image_id.encode()
