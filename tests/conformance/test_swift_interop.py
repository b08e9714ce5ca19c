"""Images that others stored in a real Swift, and others' tools on images that imagestore stored.

``IMAGESTORE_GLANCE_PYTHON`` names a Python that has glance_store 5.7.0 and python-swiftclient; without it an
environment is made below the user's cache directory.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _glance import glance_store
from _swift_testing import context, glance_python, options, running, session

from imagestore import InvalidLocation, NotFound, Store, load_stores, open_store
from imagestore.drivers.swift import SwiftDriver

pytestmark = pytest.mark.filterwarnings("error")

UNIT = 1024000  # what Glance's options call a megabyte
IMAGES = {"small": 300_000, "segments": 3 * UNIT, "unknown": 2 * UNIT + 17}


def glance(conf: Path, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    return glance_store(glance_python(), conf, *jobs)


class Place:
    """A container, a glance-api.conf with its accounts file, and our store from the same files."""

    def __init__(self, directory: Path) -> None:
        self.env = env = running("swift")
        self.container = f"interop-{uuid.uuid4().hex[:12]}"
        accounts = directory / "swift-store.conf"
        accounts.write_text(
            f"[ref1]\nuser = {env['OS_PROJECT_NAME']}:{env['OS_USERNAME']}\nkey = {env['OS_PASSWORD']}\n"
            f"auth_address = {env['OS_AUTH_URL']}\nauth_version = 3\nproject_domain_id = default\n"
        )
        self.conf = directory / "glance-api.conf"
        self.conf.write_text(
            "[DEFAULT]\nenabled_backends = old:swift\n[glance_store]\ndefault_backend = old\n[old]\n"
            f"swift_store_config_file = {accounts}\ndefault_swift_reference = ref1\n"
            f"swift_store_container = {self.container}\nswift_store_create_container_on_put = true\n"
            "swift_store_region = RegionOne\nswift_store_large_object_size = 1\n"
            "swift_store_large_object_chunk_size = 1\n"
        )
        self.paths = {name: directory / name for name in IMAGES}
        for name, path in self.paths.items():
            path.write_bytes(random.Random(name).randbytes(IMAGES[name]))
        self.stores = load_stores(str(self.conf))
        self.store: Store = self.stores["old"]
        self.session = session(env)
        self.url = self.session.get_endpoint(service_type="object-store")

    def names(self, container: str | None = None) -> list[str]:
        """What is in the container, told by Swift itself."""
        answer = self.session.get(f"{self.url}/{container or self.container}?format=json")
        return [entry["name"] for entry in answer.json()]

    def swift(self, *arguments: str | Path, cwd: Path) -> None:
        """Swift's own command."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("OS_", "ST_"))},
            **{name: value for name, value in self.env.items() if name.startswith("OS_")},
        }
        # Where Glance is, is what it needs to speak to Keystone.
        command = [Path(glance_python()).parent / "swift", *arguments]
        done = subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.paths[name].read_bytes()).hexdigest()

    def close(self) -> None:
        self.stores.close()
        for name in self.names():
            self.session.delete(f"{self.url}/{self.container}/{name}")
        self.session.delete(f"{self.url}/{self.container}")
        self.session.session.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("interop"))
    yield made
    made.close()


def test_what_glance_stored(place: Place) -> None:
    ids = {name: str(uuid.uuid4()) for name in IMAGES}
    told = glance(
        place.conf,
        *(
            {"verb": "add", "id": ids[name], "path": str(path), "size": 0 if name == "unknown" else IMAGES[name]}
            for name, path in place.paths.items()
        ),
    )
    assert f"{ids['segments']}-00003" in place.names(), "Glance did not store segments"
    assert {item.image_id for item in place.store.list()} == set(ids.values()), "segments are no images"
    for name, stored in zip(IMAGES, told, strict=True):
        uri = stored["uri"]
        assert uri == f"swift+config://ref1/{place.container}/{ids[name]}"
        assert place.store.get_size(uri) == IMAGES[name]
        with place.store.get(uri, expected={"sha256": stored["sha256"]}) as reader:
            assert b"".join(reader) == place.paths[name].read_bytes()
        with place.store.get(uri, start=1000, stop=250_000) as reader:
            assert reader.read() == place.paths[name].read_bytes()[1000:250_000]
        assert place.store.locate(ids[name]).uri == uri
        place.store.delete(uri)
        with pytest.raises(NotFound):
            place.store.get_size(uri)
    assert place.names() == []


def test_what_glance_stored_without_an_accounts_file(place: Place, tmp_path: Path) -> None:
    """Then it puts the credentials into the location. They are cut off, and those of the configuration used."""
    env = place.env
    conf = tmp_path / "glance-api.conf"
    conf.write_text(
        "[DEFAULT]\nenabled_backends = old:swift\n[glance_store]\ndefault_backend = old\n[old]\n"
        f"swift_store_auth_address = {env['OS_AUTH_URL']}\nswift_store_key = {env['OS_PASSWORD']}\n"
        f"swift_store_user = {env['OS_PROJECT_NAME']}:{env['OS_USERNAME']}\ndefault_swift_reference = ref1\n"
        f"swift_store_container = {place.container}\nswift_store_create_container_on_put = true\n"
    )
    job = {"verb": "add", "id": str(uuid.uuid4()), "path": str(place.paths["small"]), "size": IMAGES["small"]}
    uri = glance(conf, job)[0]["uri"]
    assert env["OS_PASSWORD"] in uri
    with load_stores(str(conf)) as stores:
        store = stores["old"]
        assert env["OS_PASSWORD"] not in str(store.parse(uri))
        with store.get(uri, expected={"sha256": place.sha256("small")}) as reader:
            assert len(reader.read()) == IMAGES["small"]
        store.delete(uri)
    assert place.names() == []


def test_locations_with_credentials(place: Place) -> None:
    """Of whoever they are, and whatever signs are in them."""
    env = place.env
    with open_store(
        "swift",
        auth_url=env["OS_AUTH_URL"],
        user=f"{env['OS_PROJECT_NAME']}:{env['OS_USERNAME']}",
        key=env["OS_PASSWORD"],
        container=place.container,
        create_container=True,
    ) as store:
        image = store.add("image", b"data")
        address = env["OS_AUTH_URL"].removeprefix("http://")
        assert image.location.uri == f"swift+http://{address}/{place.container}/image"
        old = f"swift+http://demo%3Ademo:old/se@cret@{address}/{place.container}/image"
        assert store.get(old).read() == b"data"
        assert store.parse(old).uri == image.location.uri
        store.delete(old)


def test_former_addresses(place: Place) -> None:
    env = place.env
    with open_store(
        "swift",
        auth_url=env["OS_AUTH_URL"],
        user=env["OS_USERNAME"],
        project_name=env["OS_PROJECT_NAME"],
        key=env["OS_PASSWORD"],
        endpoint_type="internalURL",
        container=place.container,
        create_container=True,
        accept_locations=[f"swift+https://old.example:5000/v3/{place.container}", f"swift://older/{place.container}*"],
    ) as store:
        image = store.add("image", b"data")
        old = f"swift://u:p@old.example:5000/v3/{place.container}/image"
        assert store.get(old).read() == b"data"
        assert store.parse(old) == image.location
        with pytest.raises(NotFound):
            store.get(f"swift://older/{place.container}-more/image")
        for other in (f"swift://old.example/v3/{place.container}/image", "swift://old.example:5000/v3/other/image"):
            with pytest.raises(InvalidLocation):
                store.get(other)
        store.delete(old)


def test_glance_reads_ours(place: Place) -> None:
    results = {name: place.store.add(str(uuid.uuid4()), path) for name, path in place.paths.items()}
    told = glance(place.conf, *({"verb": "get", "uri": result.location.uri} for result in results.values()))
    for name, read in zip(IMAGES, told, strict=True):
        assert read == {"count": IMAGES[name], "size": IMAGES[name], "sha256": place.sha256(name)}
    glance(place.conf, *({"verb": "delete", "uri": result.location.uri} for result in results.values()))
    assert place.names() == []


def test_swift_command_reads_ours(place: Place, tmp_path: Path) -> None:
    results = {name: place.store.add(str(uuid.uuid4()), path) for name, path in place.paths.items()}
    for name, result in results.items():
        place.swift("download", place.container, result.image_id, "-o", name, cwd=tmp_path)
        assert (tmp_path / name).read_bytes() == place.paths[name].read_bytes()
        place.store.delete(result.location)
    assert place.names() == []


@pytest.mark.parametrize("how", ["--use-slo", "--use-dlo"])
def test_what_swift_command_stored(place: Place, how: str, tmp_path: Path) -> None:
    image_id = str(uuid.uuid4())
    data = place.paths["unknown"].read_bytes()
    (tmp_path / image_id).write_bytes(data)
    place.swift("upload", how, "--segment-size", "1000000", place.container, image_id, cwd=tmp_path)
    segments = f"{place.container}_segments"
    assert len(place.names(segments)) == 3
    location = place.store.locate(image_id)
    assert place.store.get_size(location) == len(data)
    with place.store.get(location) as reader:
        assert reader.read() == data
    copy = place.store._copy(location, f"{image_id}-copy", None, None)
    place.store.delete(location)
    assert place.names(segments) == []
    with place.store.get(copy.location, expected={"sha256": place.sha256("unknown")}) as reader:
        assert reader.read() == data
    place.store.delete(copy.location)
    assert place.names() == []
    place.session.delete(f"{place.url}/{segments}")


def test_copies_of_others_do_not_share_their_fate(place: Place) -> None:
    """Whoever copies a manifest of ours copies our token with it."""
    image = place.store.add("image", place.paths["segments"])
    headers = {"X-Copy-From": f"/{place.container}/image", "Content-Length": "0"}
    place.session.put(f"{place.url}/{place.container}/other?multipart-manifest=get", headers=headers)
    other = place.store.locate("other")
    assert place.store.stat(other).token is None
    place.store.delete(other)
    with place.store.get(image.location, expected={"sha256": place.sha256("segments")}) as reader:
        assert len(reader.read()) == IMAGES["segments"]
    place.store.delete(image.location)
    assert place.names() == []


def test_nested_manifests(tmp_path: Path) -> None:
    env = running("swift", "max_manifest_segments=4")
    store = Store(
        SwiftDriver(
            options(
                auth_version="1", auth_url=env["ST_AUTH"], user=env["ST_USER"], key=env["ST_KEY"], create_container=True
            )
        ),
        _block_size=65536,
    )
    assert store.capabilities.blocks_max == 16
    data = random.Random(1).randbytes(11 * 65536 + 5)
    image = store.add("image", iter([data]), size=len(data))
    with store.get(image.location) as reader:
        assert reader.read() == data
    with store.get(image.location, start=100_000, stop=500_000) as reader:
        assert reader.read() == data[100_000:500_000]
    driver = SwiftDriver(store._template.settings)
    driver.open()
    container = driver._container("", "glance")
    assert len(list(container.entries())) == 1 + 12 + 3
    store.delete(image.location)
    assert list(container.entries()) == []
    driver.close()
    store.close()


@pytest.mark.parametrize("script", ["swift", "ceph"])
def test_temporary_urls(script: str) -> None:
    """With the account's key, and with one by option."""
    env = running(script)
    names = ("ST_AUTH", "ST_USER", "ST_KEY") if script == "swift" else ("SWIFT_AUTH_URL", "SWIFT_USER", "SWIFT_KEY")
    values = {
        **dict(zip(("auth_url", "user", "key"), (env[name] for name in names), strict=True)),
        "auth_version": "1",
        "container": f"signed-{uuid.uuid4().hex[:12]}",
        "create_container": True,
    }
    key = uuid.uuid4().hex
    data = random.Random(1).randbytes(3_000_000)
    with Store(SwiftDriver(options(**values)), _block_size=1 << 20) as store:
        location = store.add("image", data).location
        for given in (None, key):
            driver = SwiftDriver(options(**values, temp_url_key=given))
            driver.open()
            driver._client("")("POST", "", {"X-Account-Meta-Temp-Url-Key": key})
            with urllib.request.urlopen(driver.sign(location, 60)) as answer:
                assert answer.read() == data
            wrong = driver.sign(location, 60).replace("image?", "other?")
            with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
                urllib.request.urlopen(wrong)
            driver.close()
        assert store.usage().total is None
        store.delete(location)
        driver = SwiftDriver(options(**values))
        driver.open()
        driver._container("", values["container"]).remove_container()
        driver.close()


def test_access_of_others(place: Place) -> None:
    env = place.env
    port = int(env["SWIFT_PROXY_V3"].rpartition(":")[2])
    ours, theirs = (context(env, prefix, port) for prefix in ("OS", "OS2"))
    driver = SwiftDriver(options(multi_tenant=True, container="shared"))
    with Store(driver) as store:
        data = place.paths["segments"].read_bytes()
        view, other = store.bind(ours), store.bind(theirs)
        result = view.add(str(uuid.uuid4()), place.paths["segments"])
        with pytest.raises(NotFound):
            other.get(result.location)
        bound = driver.bind(ours)
        assert isinstance(bound, SwiftDriver)
        place_of = bound.parse(result.location.uri)
        for access in ({"public": True, "read": ()}, {"public": False, "read": (theirs.project_id,)}):
            bound.set_acls(place_of, write=(), **access)
            with other.get(result.location) as reader:
                assert reader.read() == data
        bound.set_acls(place_of, public=False, read=(), write=())
        with pytest.raises(NotFound):
            other.get(result.location)
        view.delete(result.location)
