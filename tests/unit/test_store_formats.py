"""Formats in a store: what is declared is looked at while it passes, and what is refused is never readable."""

from __future__ import annotations

import random
import struct

import pytest
from fake import fake_store

from imagestore import load_stores, open_store
from imagestore.config import check
from imagestore.errors import FormatError, FormatMismatch, InvalidOption, InvalidRequest, UnsafeImage
from imagestore.formats import Policy

NOISE = random.Random(5).randbytes(300_000)


def qcow2(backing=b""):
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        2,
        72 if backing else 0,
        len(backing),
        16,
        1 << 20,
        0,
        1,
        3 << 16,
        1 << 16,
        1,
        0,
        0,
    )
    image = bytearray(4 << 16)
    image[: len(header)] = header
    image[72 : 72 + len(backing)] = backing
    image[1 << 16 : (1 << 16) + 8] = struct.pack(">Q", 2 << 16)
    image[2 << 16 : (2 << 16) + 8] = struct.pack(">HHHH", 1, 1, 1, 1)
    return bytes(image)


@pytest.fixture
def pair():
    store, backend = fake_store(_block_size=4096)
    with store:
        yield store, backend


def test_a_declared_format_is_confirmed(pair):
    store, _ = pair
    result = store.add("x", iter([qcow2()]), disk_format="qcow2")
    assert result.inspection.disk_format == "qcow2"
    assert result.inspection.virtual_size == 1 << 20
    assert result.inspection.accepted
    assert store.add("y", NOISE).inspection is None, "nothing declared, nothing looked at"
    assert store.add("z", NOISE, policy=Policy()).inspection.disk_format == "raw"


def test_a_lie_is_refused_and_nothing_stays(pair):
    store, backend = pair
    with pytest.raises(FormatMismatch):
        store.add("x", iter([NOISE]), disk_format="qcow2")
    with pytest.raises(FormatError):
        store.add("x", iter([qcow2()]), disk_format="raw")
    assert not backend.images
    assert not backend.pending


def test_an_unsafe_image_is_refused_before_its_end(pair):
    store, backend = pair
    read = []

    def source():
        yield qcow2(backing=b"/etc/passwd")
        for number in range(2000):
            read.append(number)
            yield NOISE

    with pytest.raises(UnsafeImage, match="backing") as caught:
        store.add("x", source(), disk_format="qcow2")
    assert len(read) < 100
    assert caught.value.store == "s"
    assert caught.value.image_id == "x"
    assert not backend.pending


def test_warn_keeps_it_and_tells(pair):
    store, backend = pair
    result = store.add("x", qcow2(backing=b"/etc/passwd"), disk_format="qcow2", policy=Policy(mode="warn"))
    assert not result.inspection.accepted
    assert result.inspection.findings
    assert set(backend.images) == {"x"}


def test_the_policy_of_the_store_holds_where_none_is_given():
    store, _ = fake_store(_block_size=4096, policy=Policy(disk_formats=("raw",)))
    with store:
        with pytest.raises(InvalidRequest, match="qcow2"):
            store.add("x", qcow2(), disk_format="qcow2")
        assert store.add("x", qcow2(), disk_format="qcow2", policy=Policy()).inspection.accepted


def test_unknown_names_are_errors_before_anything_is_sent(pair):
    store, backend = pair
    for wrong in ({"disk_format": "qcow9"}, {"container_format": "crate"}):
        with pytest.raises(InvalidRequest):
            store.add("x", NOISE, **wrong)
    assert backend.count("create") == 0


def test_inspect_what_is_stored(pair):
    store, _ = pair
    place = store.add("x", qcow2(backing=b"/etc/passwd")).location
    inspection = store.inspect(place)
    assert inspection.disk_format == "qcow2"
    assert not inspection.accepted
    with pytest.raises(InvalidRequest):
        store.inspect(place, disk_format="qcow9")


def test_policy_from_a_file(tmp_path):
    config = tmp_path / "imagestore.conf"
    config.write_text(
        "[DEFAULT]\nenabled_backends = m:memory\n[imagestore]\npolicy_disk_formats = raw, qcow2\n"
        "policy_max_virtual_size = 512KiB\npolicy_overrides = qcow2.*:allow\n[m]\n"
    )
    with load_stores(config) as stores:
        with pytest.raises(InvalidRequest, match="vmdk"):
            stores.default.add("x", NOISE, disk_format="vmdk")
        with pytest.raises(UnsafeImage):
            stores.default.add("x", qcow2(), disk_format="qcow2")
    for wrong in ("policy_mode = maybe", "policy_disk_formats = raw, qcow9", "policy_overrides = nonsense.code:allow"):
        config.write_text(f"[DEFAULT]\nenabled_backends = m:memory\n[imagestore]\n{wrong}\n[m]\n")
        (problem,) = check([config])
        assert problem.option == wrong.partition(" ")[0]
        with pytest.raises(InvalidOption):
            load_stores(config)


def test_open_store_takes_a_policy():
    with open_store("memory", policy=Policy(disk_formats=("raw",))) as store, pytest.raises(InvalidRequest):
        store.add("x", qcow2(), disk_format="qcow2")
