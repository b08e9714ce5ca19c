"""Images that Glance's library stored in a real Cinder, and it on images that imagestore stored: one section for both.

glance_store 5.7.0 is in an environment that is made with pip. It runs os-brick's privileged part, which needs root.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _cinder_keystone import members_view, running
from _glance import glance_store
from _rbd import bindings
from _s3 import programs

from imagestore import NotFound, Store, load_stores

MIB = 1024 * 1024
GIB = 1024 * MIB
IMAGES = {"known": 21 * MIB + 17, "unknown": 300_001}


def python() -> Path:
    return programs("glance-store-5.7.0-cinder", "glance_store[cinder]==5.7.0") / "python"


class Place:
    """A project's volumes of one type, a glance-api.conf for it, and our store from the same file."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.env = running()
        self.kind = kind
        self.admin = members_view(self.env)
        self.conf = directory / "glance-api.conf"
        self.conf.write_text(
            "[DEFAULT]\nenabled_backends = old:cinder\n[glance_store]\ndefault_backend = old\n"
            f"[privsep_osbrick]\nhelper_command = {python().with_name('privsep-helper')}\n"
            f"[oslo_concurrency]\nlock_path = {directory}\n[os_brick]\nlock_path = {directory}\n[old]\n"
            f"cinder_store_auth_address = {self.env['OS_AUTH_URL']}\n"
            f"cinder_store_user_name = {self.env['OS_USERNAME']}\ncinder_store_password = {self.env['OS_PASSWORD']}\n"
            f"cinder_store_project_name = {self.env['OS_PROJECT_NAME']}\ncinder_os_region_name = RegionOne\n"
            f"cinder_volume_type = {kind}\ncinder_state_transition_timeout = 60\n"
            # What the other one does not know.
            f"connector = minimal\nsparse = {'true' if kind == 'rbd' else 'false'}\n"
        )
        self.paths = {name: directory / name for name in IMAGES}
        for name, path in self.paths.items():
            path.write_bytes(random.Random(name).randbytes(IMAGES[name]))
        self.stores = load_stores(str(self.conf))
        self.store: Store = self.stores["old"]

    def glance(self, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        told = ({**job, "project": self.env["OS_PROJECT_ID"]} for job in jobs)
        return glance_store(python(), self.conf, *told, path=bindings())

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.paths[name].read_bytes()).hexdigest()

    def close(self) -> None:
        self.stores.close()
        left = self.admin.volumes()
        for key in left:
            self.admin.delete(key)
        assert not left, "volumes stayed"


@pytest.fixture(scope="module", params=["rbd", "loop"])
def place(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Place]:
    with contextlib.closing(Place(tmp_path_factory.mktemp("interop"), request.param)) as made:
        yield made


def test_what_glance_stored(place: Place) -> None:
    """Read, sized, listed, verified and deleted, from the URI that Glance keeps."""
    ids = {name: str(uuid.uuid4()) for name in IMAGES}
    told = place.glance(
        *(
            {"verb": "add", "id": ids[name], "path": str(path), "size": 0 if name == "unknown" else IMAGES[name]}
            for name, path in place.paths.items()
        )
    )
    for name, answer in zip(IMAGES, told, strict=True):
        location = answer["uri"]
        volume = location.removeprefix("cinder://old/")
        assert place.store.parse(location).uri == location
        assert place.store.locate(ids[name]).uri == location
        assert place.store.get_size(location) == place.store.get_size(f"cinder://{volume}") == IMAGES[name]
        assert place.store.stat(location).token is None
        assert place.store.verify(location).digests["sha256"] == place.sha256(name) == answer["sha256"]
        with place.store.get(location, start=100_000, stop=200_000) as reader:
            assert reader.read() == place.paths[name].read_bytes()[100_000:200_000]
        assert place.admin.volumes()[volume]["status"] == "available"
    assert {image.image_id for image in place.store.list()} == set(ids.values())
    assert not list(place.store.uploads())
    for answer in told:
        place.store.delete(answer["uri"])
        with pytest.raises(NotFound):
            place.store.stat(answer["uri"])
    assert not place.admin.volumes()


def test_glance_on_what_we_stored(place: Place) -> None:
    """The same location, read, sized and deleted."""
    locations = {}
    for name, path in place.paths.items():
        source = iter([path.read_bytes()]) if name == "unknown" else path
        locations[name] = place.store.add(str(uuid.uuid4()), source).location.uri
    told = place.glance(*({"verb": "get", "uri": uri} for uri in locations.values()))
    for name, answer in zip(IMAGES, told, strict=True):
        assert answer == {"count": IMAGES[name], "size": IMAGES[name], "sha256": place.sha256(name)}
    place.glance(*({"verb": "delete", "uri": uri} for uri in locations.values()))
    for uri in locations.values():
        with pytest.raises(NotFound):
            place.store.stat(uri)
    # It does not wait until the volumes are gone.
    end = time.monotonic() + 60
    while place.admin.volumes():
        assert time.monotonic() < end, "the volumes stay"
        time.sleep(0.1)


@pytest.mark.parametrize("place", ["rbd"], indirect=True)
def test_a_volume_that_grew(place: Place) -> None:
    """Of unknown size, and longer than the GiB that it began with."""
    tail = random.Random(1).randbytes(5 * MIB + 1)
    zeros = bytes(16 * MIB)
    added = place.store.add("grown", [*[zeros] * 64, tail])
    assert added.size == GIB + len(tail)
    (answer,) = place.glance({"verb": "get", "uri": added.location.uri})
    assert answer == {"count": added.size, "size": added.size, "sha256": added.digests["sha256"]}
    place.store.delete(added.location)


def test_an_image_without_a_size(place: Place) -> None:
    """As Glance once stored them: it is as long as its volume."""
    made = place.admin.create("image-old", {"glance_image_id": "old", "image_owner": "x"}, place.kind)
    assert place.store.get_size(f"cinder://{made}") == GIB
    place.store.delete(f"cinder://{made}")
