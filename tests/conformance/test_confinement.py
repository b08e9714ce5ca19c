"""No id and no location, whatever a stranger makes up, reaches anything outside the data directory.

``IMAGESTORE_EXAMPLES`` sets how many are made up; the default keeps the test short.
"""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagestore import StoreError, open_store

EXAMPLES = int(os.environ.get("IMAGESTORE_EXAMPLES", "1500"))
CANARY = b"canary"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base = tmp_path_factory.mktemp("confinement")
    (base / "canary").write_bytes(CANARY)
    (base / "data-old").mkdir()
    (base / "data-old" / "canary").write_bytes(CANARY)
    data = base / "data"
    data.mkdir()
    (data / "image").write_bytes(b"image")
    (data / ".hidden").write_bytes(CANARY)
    (data / "link").symlink_to(base / "canary")
    (data / "up").symlink_to(base)
    os.mkfifo(data / "fifo")
    with open_store("file", datadir=str(data), fsync=False) as store:
        yield base, data, store


PIECES = st.sampled_from(
    [
        "..", ".", "/", "//", "canary", "image", "link", "up", "fifo", ".hidden", "data", "data-old", "%2e%2e", "%2f",
        "\\", "\x00", "?", "#", "@", ":", "localhost", "file://", "~", "$HOME", "\u2215", "\uff0e\uff0e", "etc/passwd",
        "proc/self/root", "dev/shm",
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=8).map("".join)


def check_nothing_happened(base, data):
    assert (base / "canary").read_bytes() == CANARY
    assert (base / "data-old" / "canary").read_bytes() == CANARY
    assert (data / ".hidden").read_bytes() == CANARY
    assert (data / "link").is_symlink()
    assert sorted(os.listdir(base)) == ["canary", "data", "data-old"]


@settings(max_examples=EXAMPLES)
@given(st.sampled_from(["file://", "filesystem://", "FILE://", "file:", "http://", ""]), st.booleans(), TEXTS)
@example("file://", True, "/../canary")
@example("file://", True, "/link")
@example("file://", True, "/up/canary")
@example("file://", True, "-old/canary")
@example("file://", True, "/.hidden")
def test_locations(place, scheme, inside, text):
    base, data, store = place
    uri = f"{scheme}{data}{text}" if inside else f"{scheme}{text}"
    for use in (store.stat, store.delete, lambda location: store.get(location).read()):
        with contextlib.suppress(StoreError):
            found = use(uri)
            assert found != CANARY
    if not (data / "image").exists():
        (data / "image").write_bytes(b"image")
    check_nothing_happened(base, data)


@settings(max_examples=EXAMPLES)
@given(TEXTS | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True))
def test_ids(place, image_id):
    base, data, store = place
    before = sorted(os.listdir(data))
    with contextlib.suppress(StoreError):
        result = store.add(image_id, b"x")
        assert os.path.dirname(result.location.uri.removeprefix("file://")) == str(data)
        check_nothing_happened(base, data)
        store.delete(result.location)
    assert sorted(os.listdir(data)) == before
    check_nothing_happened(base, data)
