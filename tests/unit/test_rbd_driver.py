"""The RBD driver by itself: options, locations, errors, and how it reads. There is no Ceph here."""

from __future__ import annotations

import errno
import string
import sys
import threading
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore._options import old_options
from imagestore.driver import Limits, Options
from imagestore.drivers._rbd_cluster import MARK, decoded, encoded, mark_of
from imagestore.drivers._rbd_images import ImageChunks, OpenImages, record_of, time_of
from imagestore.drivers.rbd import RbdDriver, _Upload
from imagestore.errors import (
    Cancelled,
    Changed,
    InUse,
    InvalidLocation,
    InvalidOption,
    MissingDependency,
    NotFound,
    PermissionDenied,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unavailable,
)

FSID = "9f8b1c2d-0011-4a2b-8c3d-123456789abc"
TOKEN = "0123456789abcdef" * 2
MIB = 1024 * 1024


def build(**values: Any) -> RbdDriver:
    defaults = {option.dest: option.default for option in RbdDriver.options}
    assert values.keys() <= defaults.keys()
    return RbdDriver(Options(defaults | values), store="fast", limits=Limits(workers=3))


# Options


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"pool": ""}, "pool"),
        ({"pool": "images/space"}, "pool"),
        ({"pool": "images@snap"}, "pool"),
        ({"namespace": "a/b"}, "namespace"),
        ({"data_pool": "a\nb"}, "data_pool"),
        ({"fsid": "ceph"}, "fsid"),
        ({"object_size": 6 * MIB}, "object_size"),
        ({"features": ["layering", "journaling"]}, "features"),
        ({"features": ["layering", "object-map"]}, "features"),
        ({"features": ["exclusive-lock", "fast-diff"]}, "features"),
        ({"accept_locations": ["old", ""]}, "accept_locations"),
        ({"accept_locations": ["old/name/space"]}, "accept_locations"),
    ],
)
def test_options_that_cannot_be(values: dict[str, Any], option: str) -> None:
    with pytest.raises(InvalidOption, match=f"option {option}: ") as caught:
        build(**values)
    assert caught.value.store == "fast"


def test_features_are_those_of_librbd() -> None:
    assert build()._features is None
    all_of_them = ["layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten"]
    assert build(features=all_of_them)._features == 61
    assert build(features=["layering"])._features == 1


@pytest.mark.parametrize(("size", "order"), [(4096, 12), (4 * MIB, 22), (8 * MIB, 23), (32 * MIB, 25)])
def test_object_size(size: int, order: int) -> None:
    assert build(object_size=size)._order == order


@pytest.mark.parametrize(
    ("old", "text", "new"),
    [
        ("rbd_store_chunk_size", "8", str(8 * MIB)),
        ("rbd_store_chunk_size", "6", str(4 * MIB)),
        ("rbd_store_chunk_size", "1", str(MIB)),
        ("rados_connect_timeout", "5", "5"),
        ("rados_connect_timeout", "0", None),
        ("rados_connect_timeout", "-1", None),
    ],
)
def test_old_values(old: str, text: str, new: str | None) -> None:
    option = next(each for each in old_options("rbd") if each.name == old)
    assert option.convert is not None
    assert option.convert(text) == new


@pytest.mark.parametrize("text", ["0", "-8", "many"])
def test_old_values_that_cannot_be(text: str) -> None:
    option = next(each for each in old_options("rbd") if each.name == "rbd_store_chunk_size")
    assert option.convert is not None
    with pytest.raises(ValueError, match="must be"):
        option.convert(text)


def test_missing_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rados", None)
    with pytest.raises(MissingDependency, match="python3-rados and python3-rbd"):
        build().open()


# Locations


def test_a_location_has_the_form_of_glance() -> None:
    location = build().parse(f"rbd://{FSID}/images/0f7b/snap")
    assert location.uri == f"rbd://{FSID}/images/0f7b/snap"
    assert location.key == (FSID, "images", "", "0f7b", "snap")
    assert location.image_id == "0f7b"


def test_the_old_short_form_is_not_decoded() -> None:
    location = build(pool="old").parse("RBD://a%2Fb")
    assert location.uri == "rbd://a%2Fb"
    assert location.key == ("", "old", "", "a%2Fb", "")
    assert location.image_id is None


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (f"rbd://{FSID.upper()}/images/a/snap", f"rbd://{FSID}/images/a/snap"),
        (f"rbd://{FSID}/%69mages/a/snap", f"rbd://{FSID}/images/a/snap"),
        (f"rbd://{FSID}/images/a%2fb%40c/snap", f"rbd://{FSID}/images/a%2Fb%40c/snap"),
        (f"rbd://{FSID}/images/a b/monday", f"rbd://{FSID}/images/a%20b/monday"),
    ],
)
def test_one_text_for_one_image(text: str, canonical: str) -> None:
    driver = build()
    location = driver.parse(text)
    assert location.uri == canonical
    assert driver.parse(canonical) == location


def test_a_namespace_is_part_of_the_pool() -> None:
    driver = build(namespace="team")
    location = driver.parse(f"rbd://{FSID}/images%2Fteam/a/snap")
    assert location.key == (FSID, "images", "team", "a", "snap")
    assert location.uri == f"rbd://{FSID}/images%2Fteam/a/snap"
    assert driver.parse("rbd://a").key == ("", "images", "team", "a", "")
    with pytest.raises(InvalidLocation, match="not configured"):
        driver.parse(f"rbd://{FSID}/images/a/snap")


def test_accepted_pools() -> None:
    driver = build(accept_locations=["old", "other/space"])
    assert driver.parse(f"rbd://{FSID}/old/a/snap").key[1:3] == ("old", "")
    assert driver.parse(f"rbd://{FSID}/other%2Fspace/a/snap").key[1:3] == ("other", "space")
    for place in ("other", "old%2Fspace", "other%2Fspace%2Fx", "Images"):
        with pytest.raises(InvalidLocation, match="not configured"):
            driver.parse(f"rbd://{FSID}/{place}/a/snap")


def test_another_cluster_is_refused_if_ours_is_known() -> None:
    other = FSID.replace("9", "8", 1)
    assert build().parse(f"rbd://{other}/images/a/snap")
    with pytest.raises(InvalidLocation, match="another cluster"):
        build(fsid=FSID).parse(f"rbd://{other}/images/a/snap")


@pytest.mark.parametrize(
    "text",
    [
        "rbd://",
        "rbd:///",
        "rbd:a",
        "file://a",
        f"rbd://{FSID}/images/a",
        f"rbd://{FSID}/images/a/",
        f"rbd://{FSID}//a/snap",
        f"rbd://{FSID}/images//snap",
        "rbd:///images/a/snap",
        f"rbd://{FSID}/images/a/snap/",
        "rbd://cluster/images/a/snap",
        f"rbd://{FSID}/images/a%00/snap",
        f"rbd://{FSID}/images/a%0A/snap",
        f"rbd://{FSID}/images/%ff/snap",
        f"rbd://.imagestore-{TOKEN}",
        f"rbd://{FSID}/images/.imagestore-{TOKEN}/snap",
        f"rbd://{FSID}/images/%2eimagestore-{TOKEN}/snap",
    ],
)
def test_not_locations(text: str) -> None:
    with pytest.raises(InvalidLocation):
        build().parse(text)


names = st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable() and text[0] != ".")


@given(name=names, snapshot=names)
def test_all_names_go_round(name: str, snapshot: str) -> None:
    driver = build()
    text = f"rbd://{FSID}/images/{quote(name, safe='')}/{quote(snapshot, safe='')}"
    location = driver.parse(text)
    assert location.uri == text
    assert location.key == (FSID, "images", "", name, snapshot)


@given(text=st.text(max_size=60) | st.text(alphabet="/%.@:?#" + string.hexdigits, max_size=60))
def test_any_text_is_refused_or_is_canonical(text: str) -> None:
    driver = build()
    for uri in (f"rbd://{text}", f"rbd://{FSID}/images/{text}", f"rbd://{FSID}/{text}/snap", text):
        try:
            location = driver.parse(uri)
        except InvalidLocation:
            continue
        assert location.key[1:3] == ("images", "")
        assert not location.key[3].startswith(".imagestore-")
        assert driver.parse(location.uri) == location


def test_marks() -> None:
    own = mark_of(TOKEN)
    for name in (own, f"{own}-a", f"{own}-b"):
        assert MARK.fullmatch(name)[1] == TOKEN  # type: ignore[index]
    for name in (".imagestore-", own[:-1], f"{own}.bak", f"{own}-c", f"{own}-ab", f"x{own}", own.upper()):
        assert not MARK.fullmatch(name)


# Errors


def native(number: int | None, module: str = "rbd") -> Exception:
    kind = type("OSError", (Exception,), {"__module__": module})
    error: Exception = kind("native words")
    error.errno = number  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("module", ["rbd", "rados"])
@pytest.mark.parametrize(
    ("number", "kind", "temporary"),
    [
        (errno.ENOENT, NotFound, False),
        (errno.EBUSY, InUse, False),
        (errno.ENOTEMPTY, InUse, False),
        (errno.ENOSPC, StoreFull, False),
        (errno.EDQUOT, StoreFull, False),
        (errno.EPERM, PermissionDenied, False),
        (errno.EACCES, PermissionDenied, False),
        (errno.ETIMEDOUT, StoreTimeout, True),
        (-errno.ETIMEDOUT, StoreTimeout, True),
        (errno.ESHUTDOWN, Unavailable, True),
        (errno.EIO, Unavailable, True),
    ],
)
def test_errors(number: int, kind: type[StoreError], temporary: bool, module: str) -> None:
    error = build().translate(native(number, module))
    assert type(error) is kind
    assert error.temporary is temporary


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "x"), ValueError("x"), native(None), native(errno.EDOM)])
def test_errors_that_mean_nothing_known(error: Exception) -> None:
    assert build().translate(error) is None


def test_a_blocklisted_client_connects_anew() -> None:
    driver = build()
    driver._cluster = cluster = SimpleNamespace(lost=False)  # type: ignore[assignment]
    driver.translate(native(errno.EIO))
    assert not cluster.lost
    driver.translate(native(errno.ESHUTDOWN))
    assert cluster.lost


# What librbd tells


@given(text=st.text(max_size=20))
def test_strings_as_ceph_has_them(text: str) -> None:
    assert decoded(encoded(text)) == text
    assert encoded("ab") == b"\2\0\0\0ab"


def test_times() -> None:
    assert time_of(None) is None
    assert time_of(datetime(1970, 1, 1)) is None  # noqa: DTZ001 - as librbd tells it
    assert time_of(datetime(2026, 1, 2, 3, 4, 5)) == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)  # noqa: DTZ001


class Metadata:
    def __init__(self, text: str | None) -> None:
        self.text = text

    def metadata_get(self, key: str) -> str:
        if self.text is None:
            raise KeyError(key)
        return self.text


@pytest.mark.parametrize(
    "text",
    [None, "", "words", "[]", "{}", '{"token": 5, "metadata": {}}', '{"token": "x", "metadata": {}}',
     f'{{"token": "{TOKEN}"}}'],
)  # fmt: skip
def test_metadata_of_others(text: str | None) -> None:
    assert record_of(Metadata(text)) is None


def test_metadata_of_ours() -> None:
    told = record_of(Metadata(f'{{"token": "{TOKEN}", "metadata": {{"os": "linux"}}, "more": 1}}'))
    assert told is not None
    assert told["metadata"] == {"os": "linux"}


# Growing


def test_an_image_of_unknown_size_grows_in_few_steps() -> None:
    upload = _Upload.__new__(_Upload)
    upload._growing, upload._size = threading.Lock(), 0
    sizes: list[int] = []
    upload._image = SimpleNamespace(resize=sizes.append)
    written = 0
    while written < 100 << 30:
        written += 8 * MIB
        upload._make_room(written)
        assert sizes[-1] >= written
        assert sizes[-1] - written <= max(64 * MIB, written)
        assert written < 8 << 30 or sizes[-1] - written <= written // 3
    assert len(sizes) < 40


# Reading


class Request:
    def __init__(self, handle: Handle, offset: int, length: int, done: Any) -> None:
        self.handle, self.offset, self.length, self.done = handle, offset, length, done
        self.complete = False

    def wait_for_complete_and_cb(self) -> None:
        if not self.complete:
            self.complete = True
            self.done(self, self.handle.give(self.offset, self.length))

    def is_complete(self) -> bool:
        return self.complete

    def get_return_value(self) -> int:
        return self.handle.code


class Handle:
    """An image of so many bytes in librbd; ``code`` is the error of all reads."""

    def __init__(self, size: int) -> None:
        self.data = bytes(range(256)) * (size // 256 + 1)
        self.data = self.data[:size]
        self.code = 0
        self.requests: list[Request] = []

    def aio_read(self, offset: int, length: int, done: Any) -> Request:
        self.requests.append(Request(self, offset, length, done))
        return self.requests[-1]

    def give(self, offset: int, length: int) -> bytes | None:
        return None if self.code else self.data[offset : offset + length]


class Image:
    def __init__(self, size: int) -> None:
        self.handle = Handle(size)
        self.key = ("pool", "name", "snap")
        self.checks: list[int] = []
        self.gone = False
        self.closed = 0

    def check(self) -> None:
        self.checks.append(sum(request.complete for request in self.handle.requests))
        if self.gone:
            raise Unavailable("gone")

    def close(self) -> None:
        self.closed += 1


def reading(size: int, start: int = 0, stop: int | None = None) -> tuple[Image, OpenImages, ImageChunks]:
    image, images = Image(size), OpenImages()
    chunks = ImageChunks(image, start, size if stop is None else stop, images)  # type: ignore[arg-type]  # a fake
    return image, images, chunks


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 20 * MIB), (5, 20 * MIB - 7), (3 * MIB, 3 * MIB + 1), (MIB - 1, MIB + 1)]
)
def test_a_range_is_read_in_order(start: int, stop: int) -> None:
    image, images, chunks = reading(20 * MIB, start, stop)
    assert b"".join(chunks) == image.handle.data[start:stop]
    assert images._idle == [image]
    # No request reaches over the border of two objects.
    assert all(each.offset // MIB == (each.offset + each.length - 1) // MIB for each in image.handle.requests)


def test_requests_are_on_their_way_in_advance_but_not_many() -> None:
    image, _, chunks = reading(64 * MIB)
    next(chunks)
    assert 4 <= len(image.handle.requests) <= 20
    assert not image.handle.requests[3].complete


def test_nothing_is_given_away_that_was_not_there_after_it_was_read() -> None:
    image, _, chunks = reading(20 * MIB)
    for count in range(1, 4):
        next(chunks)
        assert image.checks[-1] >= count, "the check came before the bytes"
    image.gone = True
    given = []
    with pytest.raises(Unavailable):
        given.extend(chunks)
    assert not given, "a piece that nobody has checked"


def test_one_check_covers_all_that_has_arrived() -> None:
    image, _, chunks = reading(20 * MIB)
    chunks._ask()
    for request in image.handle.requests[:5]:
        request.wait_for_complete_and_cb()
    for _ in range(5):
        next(chunks)
    assert len(image.checks) == 1
    next(chunks)
    assert len(image.checks) == 2


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (-errno.ENOENT, Unavailable),
        (-errno.ETIMEDOUT, StoreTimeout),
        (-errno.EPERM, PermissionDenied),
        (-999, Unavailable),
    ],
)
def test_a_read_that_fails(code: int, kind: type[StoreError]) -> None:
    image, images, chunks = reading(20 * MIB)
    next(chunks)
    image.handle.code = code
    with pytest.raises(kind):
        next(chunks)
    assert images._idle == [image], "the image was not given back"
    with pytest.raises(Cancelled):
        next(chunks)


def test_an_image_that_became_shorter() -> None:
    image, _, chunks = reading(20 * MIB)
    image.handle.data = image.handle.data[: MIB + 5]
    given: list[bytes] = []
    with pytest.raises(Changed):
        given.extend(chunks)
    assert len(b"".join(given)) == MIB


def test_closing_waits_for_requests_and_gives_back_once() -> None:
    image, images, chunks = reading(20 * MIB)
    next(chunks)
    chunks.close()
    chunks.close()
    assert all(request.complete for request in image.handle.requests)
    assert images._idle == [image]
    with pytest.raises(Cancelled):
        next(chunks)


def test_few_idle_images_are_kept() -> None:
    images = OpenImages()
    made = [Image(0) for _ in range(12)]
    for image in made:
        images.give(image)  # type: ignore[arg-type]  # a fake
    assert sum(image.closed for image in made) == 4
    images.close()
    late = Image(0)
    images.give(late)  # type: ignore[arg-type]  # a fake
    assert [image.closed for image in (*made, late)] == [1] * 13
