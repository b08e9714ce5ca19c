"""Images that others stored in a real Ceph cluster, and others' tools on images that imagestore stored.

``IMAGESTORE_GLANCE_PYTHON`` names a Python that has glance_store 5.7.0; without it an environment is made with pip. The
command ``rbd`` is the system's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _glance import glance_store
from _rbd import Admin, bindings, running
from _s3 import programs

from imagestore import NotFound, Store, load_stores

# The environment that the tests of S3 make, so that there is one.
GLANCE = ("glance_store==5.7.0", "boto3>=1.36")
MIB = 1024 * 1024
IMAGES = {"small": 300_000, "large": 21 * MIB + 17, "unknown": 11 * MIB + 3}


def glance(conf: Path, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    python = os.environ.get("IMAGESTORE_GLANCE_PYTHON") or programs("glance-store-5.7.0-s3", *GLANCE) / "python"
    return glance_store(python, conf, *jobs, path=bindings())


class Place:
    """A pool, a glance-api.conf for it, and our store from the same file."""

    def __init__(self, directory: Path) -> None:
        self.env = running()
        self.admin = Admin(self.env)
        self.pool = self.admin.make_pool()
        self.directory = directory
        self.conf = directory / "glance-api.conf"
        self.conf.write_text(
            "[DEFAULT]\nenabled_backends = old:rbd\n[glance_store]\ndefault_backend = old\n[old]\n"
            f"rbd_store_ceph_conf = {self.env['CEPH_CONF']}\nrbd_store_user = admin\nrbd_store_pool = {self.pool}\n"
            "rbd_store_chunk_size = 4\nrados_connect_timeout = 20\nrbd_thin_provisioning = false\n"
        )
        self.paths = {name: directory / name for name in IMAGES}
        for name, path in self.paths.items():
            path.write_bytes(random.Random(name).randbytes(IMAGES[name]))
        self.stores = load_stores(str(self.conf))
        self.store: Store = self.stores["old"]

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.paths[name].read_bytes()).hexdigest()

    def rbd(self, *arguments: str | Path) -> bytes:
        done = subprocess.run(
            ["rbd", "--conf", self.env["CEPH_CONF"], "--id", "admin", *arguments],
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        self.stores.close()
        stayed = self.admin.objects(self.pool)
        self.admin.delete_pool(self.pool)
        self.admin.close()
        assert not stayed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with contextlib.closing(Place(tmp_path_factory.mktemp("interop"))) as made:
        yield made


def test_what_glance_stored(place: Place) -> None:
    """Read, sized, listed, verified and deleted, from the URI that Glance keeps."""
    ids = {name: str(uuid.uuid4()) for name in IMAGES}
    told = glance(
        place.conf,
        *(
            {"verb": "add", "id": ids[name], "path": str(path), "size": 0 if name == "unknown" else path.stat().st_size}
            for name, path in place.paths.items()
        ),
    )
    for name, answer in zip(IMAGES, told, strict=True):
        location = answer["uri"]
        assert location == f"rbd://{place.admin.fsid}/{place.pool}/{ids[name]}/snap"
        assert place.store.parse(location).uri == location
        assert place.store.locate(ids[name]).uri == location
        assert place.store.get_size(location) == IMAGES[name]
        assert place.store.stat(location).token is None
        assert place.store.verify(location).digests["sha256"] == place.sha256(name) == answer["sha256"]
    assert {image.image_id for image in place.store.list()} == set(ids.values())
    assert not list(place.store.uploads())
    for answer in told:
        place.store.delete(answer["uri"])
        with pytest.raises(NotFound):
            place.store.stat(answer["uri"])


def test_glance_on_what_we_stored(place: Place) -> None:
    """The same location, read, sized and deleted."""
    locations = {}
    for name, path in place.paths.items():
        source = iter([path.read_bytes()]) if name == "unknown" else path
        locations[name] = place.store.add(str(uuid.uuid4()), source).location.uri
    told = glance(place.conf, *({"verb": "get", "uri": uri} for uri in locations.values()))
    for name, answer in zip(IMAGES, told, strict=True):
        assert answer == {"count": IMAGES[name], "size": IMAGES[name], "sha256": place.sha256(name)}
    glance(place.conf, *({"verb": "delete", "uri": uri} for uri in locations.values()))
    for uri in locations.values():
        with pytest.raises(NotFound):
            place.store.stat(uri)


def test_rbd_export(place: Place) -> None:
    name, data = str(uuid.uuid4()), os.urandom(MIB) + bytes(9 * MIB) + os.urandom(5 * MIB + 11)
    location = place.store.add(name, data).location
    assert place.rbd("export", f"{place.pool}/{name}@snap", "-") == data
    assert name in place.rbd("ls", place.pool).decode().split()
    place.store.delete(location)
    assert place.rbd("ls", place.pool) == b""


def test_rbd_import(place: Place) -> None:
    name, path = str(uuid.uuid4()), place.paths["large"]
    image = f"{place.pool}/{name}"
    place.rbd("import", path, image)
    assert not place.store.exists(name)
    place.rbd("snap", "create", f"{image}@snap")
    location = place.store.locate(name)
    assert place.store.verify(location).digests["sha256"] == place.sha256("large")
    place.rbd("snap", "protect", f"{image}@snap")
    assert place.store.verify(location).size == IMAGES["large"]
    place.store.delete(location)


def test_a_volume_from_an_image(place: Place) -> None:
    """What Nova and Cinder do: clone, write, and flatten; then the image can be deleted."""
    name, data = str(uuid.uuid4()), place.paths["large"].read_bytes()
    location = place.store.add(name, place.paths["large"]).location
    fsid, pool, image, snapshot = location.uri.removeprefix("rbd://").split("/")
    assert (fsid, pool, image) == (place.admin.fsid, place.pool, name)
    place.rbd("clone", f"{pool}/{image}@{snapshot}", f"{pool}/volume")
    assert place.admin.contents(pool, "volume") == data
    place.rbd("flatten", f"{pool}/volume")
    place.store.delete(location)
    assert place.admin.contents(pool, "volume") == data
    place.rbd("rm", f"{pool}/volume")
