"""The life of an image: what leads where, that it is Glance's life and more, and the image as a value."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from datetime import UTC, datetime
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore import image as door
from imagestore.errors import IllegalTransition, InvalidRequest, WrongStatus
from imagestore.image import EVENTS, TRANSITIONS, Event, Image, ImageLocation, ImageStatus, check_transition

# The transitions that OpenStack's image service documents for API version 2, status by status.
GLANCE = {
    "queued": {"saving", "uploading", "importing", "active", "deleted"},
    "saving": {"active", "killed", "deleted", "queued"},
    "uploading": {"importing", "queued", "deleted"},
    "importing": {"active", "deleted", "queued"},
    "active": {"pending_delete", "deleted", "deactivated"},
    "killed": {"deleted"},
    "pending_delete": {"deleted", "active"},
    "deleted": set(),
    "deactivated": {"active", "deleted"},
}
GLANCE_PAIRS = [(old, new) for old, news in GLANCE.items() for new in sorted(news)]
# What is allowed beyond it; docs/reference/image.md has the reasons.
BEYOND = {
    ("queued", "pending_delete"),
    ("saving", "pending_delete"),
    ("uploading", "pending_delete"),
    ("importing", "pending_delete"),
    ("killed", "pending_delete"),
    ("deactivated", "pending_delete"),
    ("pending_delete", "deactivated"),
}
PAIRS = [(str(old), str(new)) for old, new in product(ImageStatus, ImageStatus)]
NOW = datetime(2026, 11, 22, tzinfo=UTC)
PLACE = (ImageLocation(store="fast", uri="file:///images/a"),)
FORMATS = {"disk_format": "qcow2", "container_format": "bare"}
DATA = {"size": 3, "virtual_size": 9, "digests": {"sha256": "ab"}, "locations": PLACE}


def image_in(status: ImageStatus) -> Image:
    if status in (ImageStatus.ACTIVE, ImageStatus.DEACTIVATED, ImageStatus.PENDING_DELETE):
        return Image(id="a", status=status, **FORMATS, **DATA)  # type: ignore[arg-type]
    return Image(id="a", status=status, **FORMATS)


# Glance's table


@pytest.mark.parametrize("status", GLANCE)
def test_every_status_of_glance_is_one(status: str) -> None:
    assert ImageStatus(status) == status


@pytest.mark.parametrize(("old", "new"), GLANCE_PAIRS)
def test_what_glance_allows_is_allowed(old: str, new: str) -> None:
    check_transition(ImageStatus(old), ImageStatus(new))


@pytest.mark.parametrize(("old", "new"), [pair for pair in PAIRS if pair not in GLANCE_PAIRS])
def test_what_glance_forbids_is_forbidden_but_for_the_differences(old: str, new: str) -> None:
    if (old, new) in BEYOND:
        check_transition(ImageStatus(old), ImageStatus(new))
    else:
        with pytest.raises(IllegalTransition):
            check_transition(ImageStatus(old), ImageStatus(new))


def test_the_differences_are_in_the_documentation_with_their_reasons() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "image.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` → `(\w+)` +\| (.+) \|$", page, re.MULTILINE)
    assert {(old, new) for old, new, _ in rows} == BEYOND
    assert all(len(reason.split()) > 5 for _, _, reason in rows)


# Transitions and events


def test_transitions_are_those_of_the_events() -> None:
    assert {(old, new) for old, news in TRANSITIONS.items() for new in news} == {
        pair for steps in EVENTS.values() for pair in steps.items()
    }
    assert set(EVENTS) == set(Event)
    assert all(
        EVENTS[event][old] is new for old, news in TRANSITIONS.items() for new, by in news.items() for event in by
    )


def test_every_status_is_reached_and_all_end() -> None:
    reached, todo = set(), [ImageStatus.QUEUED]
    while todo:
        if (status := todo.pop()) not in reached:
            reached.add(status)
            todo += TRANSITIONS[status]
    assert reached == set(ImageStatus)
    assert not TRANSITIONS[ImageStatus.DELETED]
    assert all(ImageStatus.DELETED in TRANSITIONS[status] for status in ImageStatus if status != "deleted")


def test_the_tables_can_not_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[ImageStatus.DELETED] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        EVENTS[Event.RESTORED][ImageStatus.DELETED] = ImageStatus.ACTIVE  # type: ignore[index]


@pytest.mark.parametrize("kind", [ImageStatus, Event])
def test_every_status_and_event_says_what_it_means(kind: type) -> None:
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    said = {
        node.targets[0].id: following.value.value
        for node, following in pairwise(tree.body)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }
    assert {member.name for member in kind} == set(said)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("queued", "pending_delete", None),
        ("queued", "killed", "it may become saving, uploading, importing, active, deleted or pending_delete"),
        ("pending_delete", "saving", "it may become deleted, active or deactivated"),
        ("active", "active", "an image that is active can't become active; it may become"),
        ("deleted", "active", "an image that is deleted can't become active; it stays so for ever"),
    ],
)
def test_an_illegal_transition_names_what_is_allowed(old: str, new: str, text: str | None) -> None:
    if text is None:
        return check_transition(ImageStatus(old), ImageStatus(new))
    with pytest.raises(IllegalTransition) as caught:
        check_transition(ImageStatus(old), ImageStatus(new))
    assert text in str(caught.value)
    return None


# Images


@pytest.mark.parametrize(("event", "status"), list(product(Event, ImageStatus)))
def test_an_event_leads_where_it_should_or_is_refused(event: Event, status: ImageStatus) -> None:
    image = image_in(status)
    new = EVENTS[event].get(status)
    if new is None:
        with pytest.raises(IllegalTransition, match=f"^{event} can't happen to an image that is {status}; it "):
            image.on(event)
        return
    comes = DATA if new is ImageStatus.ACTIVE and not image.locations else {}
    after = image.on(event, at=NOW, **comes)  # type: ignore[arg-type]
    assert after.status is new
    assert after.updated_at == NOW
    assert image == image_in(status)
    assert bool(after.locations) == (
        new in {"active", "deactivated"} or (new == "pending_delete" and bool(image.locations))
    )


def test_a_whole_life() -> None:
    image = Image(id="a", **FORMATS)
    saving = image.on(Event.UPLOAD_STARTED, at=NOW)
    active = saving.on(Event.UPLOAD_COMPLETED, **DATA)  # type: ignore[arg-type]
    assert (active.size, active.virtual_size, active.digests, active.locations) == (3, 9, {"sha256": "ab"}, PLACE)
    deleted = active.on(Event.DEACTIVATED).on(Event.DELETE_DELAYED, at=NOW)
    assert (deleted.deleted_at, deleted.before_delete, deleted.locations) == (NOW, "deactivated", PLACE)
    again = deleted.on(Event.RESTORED_DEACTIVATED)
    assert (again.deleted_at, again.before_delete, again.size) == (None, None, 3)
    gone = deleted.on(Event.SCRUBBED)
    assert (gone.status, gone.locations, gone.size, gone.digests) == ("deleted", (), 3, {"sha256": "ab"})


def test_nothing_is_known_of_data_in_a_queued_image() -> None:
    failed = image_in(ImageStatus.SAVING).on(Event.UPLOAD_FAILED)
    assert (failed.size, failed.virtual_size, failed.digests, failed.locations) == (None, None, {}, ())


@pytest.mark.parametrize("event", [Event.UPLOAD_STARTED, Event.STAGING_STARTED, Event.IMPORT_STARTED])
@pytest.mark.parametrize("known", [{}, {"disk_format": "raw"}, {"container_format": "bare"}])
def test_formats_are_declared_before_data_comes(event: Event, known: dict[str, str]) -> None:
    image = Image(id="a", **known)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="declare them first"):
        image.on(event)
    assert image.declare(**FORMATS).on(event).disk_format == "qcow2"


@pytest.mark.parametrize("status", [status for status in ImageStatus if status != "queued"])
def test_formats_are_fixed_once_data_comes(status: ImageStatus) -> None:
    with pytest.raises(WrongStatus, match=f"of an image that is {status} can't be changed"):
        image_in(status).declare(disk_format="raw")


def test_declaring_one_format_leaves_the_other() -> None:
    image = Image(id="a", **FORMATS).declare(disk_format="raw")
    assert (image.disk_format, image.container_format) == ("raw", "bare")


@pytest.mark.parametrize("status", ImageStatus)
def test_who_may_read(status: ImageStatus) -> None:
    image = image_in(status)
    assert image.readable() == (status == "active")
    assert image.readable(administrator=True) == (status in {"active", "deactivated"})
    for administrator in (False, True):
        if image.readable(administrator=administrator):
            image.check_readable(administrator=administrator)
        else:
            with pytest.raises(WrongStatus, match=f"an image that is {status} can't be read"):
                image.check_readable(administrator=administrator)


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "active"},
        {"status": "active", "locations": PLACE},
        {"status": "deactivated", "size": 1},
        {"size": 1},
        {"virtual_size": 1},
        {"digests": {"sha256": "ab"}},
        {"locations": PLACE},
        {"status": "killed", "size": 0},
        {"status": "saving", "locations": PLACE},
        {"status": "deleted", "locations": PLACE},
        {"status": "saving", "disk_format": None},
        {"status": "active", "size": 1, "locations": PLACE, "container_format": None},
    ],
)
def test_values_that_do_not_go_together(wrong: dict[str, object]) -> None:
    given_ = FORMATS | wrong
    given_["status"] = ImageStatus(str(given_.get("status", "queued")))
    with pytest.raises(InvalidRequest, match="an image that is "):
        Image(id="a", **given_)  # type: ignore[arg-type]


@pytest.mark.parametrize(("event", "more"), [("deactivated", DATA), ("upload_failed", {"size": 0}), ("restored", DATA)])
def test_data_comes_only_with_what_brings_it(event: str, more: dict[str, object]) -> None:
    status = next(iter(EVENTS[Event(event)]))
    with pytest.raises(InvalidRequest, match="no data comes with"):
        image_in(status).on(Event(event), **more)  # type: ignore[arg-type]


def test_an_image_never_changes() -> None:
    digests = {"sha256": "ab"}
    image = Image(id="a", status=ImageStatus.ACTIVE, size=1, locations=PLACE, digests=digests, **FORMATS)  # type: ignore[arg-type]
    digests["md5"] = "cd"
    assert image.digests == {"sha256": "ab"}
    with pytest.raises(TypeError):
        image.digests["md5"] = "cd"  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        image.size = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Image("a")  # type: ignore[misc]


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_any_sequence_of_events_is_a_legal_life(events: list[Event]) -> None:
    image = Image(id="a", **FORMATS)
    for event in events:
        comes = DATA if EVENTS[event].get(image.status) == "active" and not image.locations else {}
        try:
            after = image.on(event, **comes)  # type: ignore[arg-type]
        except IllegalTransition:
            assert image.status not in EVENTS[event]
        except InvalidRequest:
            # Data of a deleted image that never had any can't come back.
            assert image.status == "pending_delete"
            assert not image.locations
        else:
            check_transition(image.status, after.status)
            image = after


def test_the_door_is_complete() -> None:
    public = {
        name
        for name, value in vars(door).items()
        if name[0] != "_" and getattr(value, "__module__", "") == door.__name__
    }
    assert set(door.__all__) == public | {"EVENTS", "TRANSITIONS"}
