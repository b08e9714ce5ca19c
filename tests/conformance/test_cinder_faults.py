"""What goes wrong around a real Cinder: limits, states, its own death, a client's death, and a lost device."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagestore import Retry, Store
from imagestore.driver import Driver
from imagestore.drivers import _cinder_attach
from imagestore.drivers._cinder_client import Api
from imagestore.drivers.cinder import CinderDriver
from imagestore.errors import (
    InUse,
    LimitExceeded,
    NotFound,
    StoreError,
    StoreFull,
    StoreTimeout,
    Unavailable,
    Unsupported,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

import _rbd
from cinder_testing import Project, driver, running, started

SERVERS = Path(__file__).parents[1] / "servers"
MIB = 1024 * 1024
GIB = 1024 * MIB
DATA = b"0123456789abcdef" * 20_000


@pytest.fixture
def project() -> Iterator[Project]:
    """A project of the test's own, in which nothing may stay."""
    made = Project(running()["CINDER_URL"], uuid.uuid4().hex)
    yield made
    assert made.names() == []


def opened(project: Project, kind: str = "rbd-multi", **values: Any) -> Store:
    told = {"noauth_project": project.id, "volume_type": kind, "sparse": kind.startswith("rbd"), **values}
    return Store(driver(project.server, **told), name="kit", retry=Retry(attempts=1))


# Limits and states


def test_quota(project: Project) -> None:
    project.set_quota(gigabytes=0)
    with opened(project) as store:
        with pytest.raises(StoreFull, match="quota"):
            store.add("image", DATA)
        assert store.usage().free == 0
        project.set_quota(gigabytes=1)
        source = iter([bytes(8 * MIB)] * 128 + [b"more than a GiB"])
        with pytest.raises(StoreFull, match="quota"):
            store.add("image", source, digests=())
        assert project.names() == []
        project.set_quota(gigabytes=10, per_volume_gigabytes=1)
        with pytest.raises(LimitExceeded):
            store.add("image", iter([DATA]), size=2 * GIB)
        store.delete(store.add("image", DATA).location)


@pytest.mark.parametrize("attached", [False, True])
def test_image_of_unknown_size_grows(project: Project, attached: bool) -> None:
    """Past the first GiB, detached for it or not; and zeros at the end count."""
    with opened(project, extend_attached=attached) as store:
        source = iter([DATA.ljust(8 * MIB, b"\0"), *[bytes(8 * MIB)] * 127, DATA, bytes(GIB)])
        location = store.add("image", source, digests=()).location
        assert store.get_size(location) == 2 * GIB + len(DATA)
        assert project.volumes()[location.key[0]]["size"] == 3
        for start in (0, GIB):
            with store.get(location, start=start, stop=start + len(DATA) + 1) as reader:
                assert reader.read() == DATA + b"\0"
        store.delete(location)


def test_no_backend_has_room(project: Project) -> None:
    project.make_type("nowhere", volume_backend_name="nowhere")
    with opened(project, "nowhere") as store, pytest.raises(StoreFull, match="could not make room"):
        store.add("image", DATA)


def test_encrypted_types_are_refused(project: Project) -> None:
    project.make_type("encrypted", encrypted=True, volume_backend_name="loop")
    taken: list[bytes] = []

    def source() -> Iterator[bytes]:
        taken.append(DATA)
        yield DATA

    with opened(project, "encrypted") as store, pytest.raises(Unsupported, match="encrypted"):
        store.add("image", source())


def test_volume_that_fails_in_the_midst(project: Project) -> None:
    """Whatever Cinder makes of it: the image is whole, or nothing is left."""
    with opened(project) as store:

        def source() -> Iterator[bytes]:
            yield DATA
            (volume_id,) = project.volumes()
            project.reset(volume_id, "error")
            yield DATA

        try:
            location = store.add("image", source(), size=2 * len(DATA)).location
        except StoreError:
            assert not store.exists("image")
            store.collect(older_than=0, include_alive=True)
        else:
            assert store.verify(location).size == 2 * len(DATA)
            store.delete(location)


def test_attach_that_is_refused(project: Project) -> None:
    """A volume that may be attached once only, and is."""
    with opened(project, "rbd") as store:
        location = store.add("image", DATA).location
        other = project.reserve(location.key[0])
        with pytest.raises(Unavailable, match="refuses") as caught:
            store.get(location)
        assert caught.value.temporary
        with pytest.raises(InUse):
            store.delete(location)
        project.release(other)
        with store.get(location) as one, store.get(location, start=5) as two:
            assert one.read() + two.read() == DATA + DATA[5:]
        store.delete(location)


def test_snapshots_keep_an_image(project: Project) -> None:
    with opened(project) as store:
        location = store.add("image", DATA).location
        snapshot = project.snapshot(location.key[0])
        with pytest.raises(InUse):
            store.delete(location)
        assert store.verify(location).size == len(DATA)
        project.delete_snapshot(snapshot)
        store.delete(location)


# Attachments


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes of all attachments that are made."""
    modes: list[str] = []
    real = Api.reserve

    def reserve(self: Api, volume_id: str, mode: str) -> str:
        modes.append(mode)
        return real(self, volume_id, mode)

    monkeypatch.setattr(Api, "reserve", reserve)
    return modes


def test_attachments_are_as_few_as_can_be(
    project: Project, attached: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than any machine takes between two pieces of a download.
    monkeypatch.setattr(_cinder_attach, "_LINGER", 20)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = bytes(9 * MIB) + DATA + bytes(20 * MIB) + DATA
    with opened(project) as store:
        location = store.add("image", data).location
        with store.get(location) as one, store.get(location) as other:
            assert one.read() == data
            assert other.read() == data
        assert attached == ["rw", "ro"]
        assert not list(tmp_path.iterdir()), "os-brick's file with the key stayed"
        # The last piece of it waits for one that does not come; let it.
        monkeypatch.setattr(_cinder_attach, "_LINGER", 2)
        store.download(location, tmp_path / "image")
        assert (tmp_path / "image").read_bytes() == data
        assert attached.count("ro") == 2
        assert [path.name for path in tmp_path.iterdir()] == ["image"]
        store.delete(location)


def test_device_that_goes_away(project: Project, attached: list[str]) -> None:
    """The cluster shuts the reader out; it comes back by another attachment, and goes on where it was."""
    admin = _rbd.Admin(_rbd.running())
    pool = admin.env["CEPH_VOLUMES_POOL"]
    data = os.urandom(64 * MIB)  # more than is asked for ahead of the reader
    try:
        with opened(project) as store:
            location = store.add("image", data).location
            patient = Store(store_driver(project), name="kit", retry=Retry(attempts=3, first=0.01))
            with patient, patient.get(location) as reader:
                got = reader.read(3 * MIB)
                with admin.pool(pool) as ioctx, admin.sdk.Image(ioctx, f"volume-{location.key[0]}") as image:
                    own = admin.cluster.get_addrs()
                    watchers = [watcher["addr"] for watcher in image.watchers_list()]
                    (reading,) = [address for address in watchers if address not in own]
                admin.command("osd blocklist", blocklistop="add", addr=reading)
                got += reader.read()
            assert got == data
            assert attached.count("ro") == 2
            store.delete(location)
    finally:
        admin.close()


def store_driver(project: Project) -> Driver:
    return driver(project.server, noauth_project=project.id, volume_type="rbd-multi", sparse=True)


# A client's death

CHILD = """\
import json, os, re, sys

told = json.loads(sys.argv[1])
sys.path[:0] = told["path"]

from cinder_testing import driver
from imagestore import Store
from imagestore.drivers._cinder_client import Api

real = Api._ask

def ask(self, method, path, body=None, **values):
    answer = real(self, method, path, body, **values)
    if method == told["method"] and re.fullmatch(told["request"], path):
        os.kill(os.getpid(), 9)
    return answer

store = Store(driver(told["server"], **told["options"]), name="kit")
verb, name = told["verb"], told["image"]
location = None if verb == "add" else store.locate(name)
Api._ask = ask
if verb == "add":
    store.add(name, b"0123456789abcdef" * 20_000, size=320_000)
elif verb == "read":
    with store.get(location) as reader:
        reader.read()
elif verb == "delete":
    store.delete(location)
"""
# The request after whose answer the client dies.
ADDING = {
    "create": ("post", "/volumes"),
    "export": ("put", "/attachments/[^/]*"),
    "complete": ("post", "/attachments/[^/]*/action"),
    "mark": ("post", "/volumes/[^/]*/metadata"),
    "publish": ("put", "/volumes/[^/]*"),
}
READING = {
    "begin": ("post", "/volumes/[^/]*/metadata"),
    "read": ("post", "/attachments/[^/]*/action"),
    "end": ("delete", "/attachments/[^/]*"),
}
DELETING = {"delete": ("delete", "/volumes/[^/]*")}


def test_client_that_is_killed(project: Project) -> None:
    """Killed after any request of an add, a read or a delete: what it left is listed, and collected."""
    options = {"noauth_project": project.id, "volume_type": "rbd-multi", "sparse": True}
    children = []
    with opened(project) as store:
        for name in (*READING, *DELETING):
            store.add(name, DATA)
        for verb, phases in (("add", ADDING), ("read", READING), ("delete", DELETING)):
            for name, (method, request) in phases.items():
                told = {"verb": verb, "image": name, "method": method, "request": request}
                told.update(path=[str(SERVERS), _rbd.bindings()], server=project.server, options=options)
                command = [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(told)]
                children.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        for child in children:
            _, said = child.communicate(timeout=120)
            assert child.returncode == -signal.SIGKILL, said
        left = {item.image_id for item in store.uploads()}
        assert left >= {*ADDING, *READING} - {"publish"}
        assert left <= {*ADDING, *READING, *DELETING} - {"publish"}
        assert {image.image_id for image in store.list()} == {"publish", *READING}
        with pytest.raises(InUse):
            store.delete(store.locate("read"))
        assert store.collect() == [], "what is young was taken"
        store.collect(older_than=0)
        assert not list(store.uploads())
        assert {image.image_id for image in store.list()} == {"publish", *READING}
        for image in store.list():
            with store.get(image.location) as reader:
                assert reader.read() == DATA
            store.delete(image.location)


# Cinder's death


class Gate:
    """Holds a driver at a request, once: before it is sent, or when its answer is there, which then is lost."""

    def __init__(self, method: str, request: str, *, lost: bool) -> None:
        self.method, self.request, self.lost = method, request, lost
        self.arrived, self.go = threading.Event(), threading.Event()

    def between(self, method: str, path: str, ask: Callable[[], Any]) -> Any:
        if self.arrived.is_set() or method != self.method or not re.fullmatch(self.request, path):
            return ask()
        if self.lost:
            ask()
        self.arrived.set()
        assert self.go.wait(120)
        if self.lost:
            raise Unavailable("the answer was lost")
        return ask()


class GatedDriver(CinderDriver):
    gate: Gate

    def _act_for(self, client: Any) -> None:
        super()._act_for(client)
        assert self._known is not None
        real = self._known._ask

        def ask(method: str, path: str, *arguments: Any, **values: Any) -> Any:
            return self.gate.between(method, path, lambda: real(method, path, *arguments, **values))

        self._known._ask = ask  # type: ignore[method-assign]  # of this one object


class Held:
    """An operation in a thread, held at a gate."""

    def __init__(self, project: Project, gate: Gate, work: Callable[[Store], Any]) -> None:
        self.gate = gate
        plain = driver(project.server, noauth_project=project.id, volume_type="loop-multi", state_timeout=5)
        made = GatedDriver(plain.settings, store="kit", timeouts=plain.timeouts)
        made.gate = gate
        self.store = Store(made, name="kit", retry=Retry(attempts=2, first=0.05))
        self.error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work(self.store)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error
        finally:
            self.gate.arrived.set()

    def wait(self) -> None:
        assert self.gate.arrived.wait(60)
        assert self._thread.is_alive(), f"it ended before: {self.error!r}"

    def end(self) -> BaseException | None:
        self.gate.go.set()
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.error


def test_cinder_that_is_killed(tmp_path: Path) -> None:
    """Killed in the midst of everything at once, and started again: nothing is lost, and what is left is collected."""
    place = str(tmp_path / "cinder")
    server = started("--loop", "file", place=place)
    try:
        killed_and_started(Project(server["CINDER_URL"], uuid.uuid4().hex), place)
    finally:
        subprocess.run([SERVERS / "cinder", "stop", place], check=True, capture_output=True, timeout=60)
        shutil.rmtree(place)


def killed_and_started(project: Project, place: str) -> None:
    def add(name: str) -> Callable[[Store], Any]:
        return lambda store: store.add(name, DATA)

    with opened(project, "loop-multi", state_timeout=5) as store:
        for name in ("delete", "read"):
            store.add(name, DATA)
        held = {
            "attach": Held(project, Gate("put", "/attachments/[^/]*", lost=True), add("attach")),
            "write": Held(project, Gate("post", "/attachments/[^/]*/action", lost=False), add("write")),
            "detach": Held(project, Gate("delete", "/attachments/[^/]*", lost=False), add("detach")),
            "begun": Held(project, Gate("post", "/volumes/[^/]*/metadata", lost=True), add("begun")),
            "commit": Held(project, Gate("put", "/volumes/[^/]*", lost=True), add("commit")),
        }
        reader = store.get(store.locate("read"))
        for each in held.values():
            each.wait()
        location = store.locate("delete")
        held["delete"] = Held(
            project, Gate("delete", "/volumes/[^/]*", lost=True), lambda store: store.delete(store.parse(location.uri))
        )
        held["create"] = Held(project, Gate("post", "/volumes", lost=True), add("create"))
        for name in ("delete", "create"):
            held[name].wait()
        subprocess.run([SERVERS / "cinder", "kill", place], check=True, capture_output=True, timeout=60)
        with pytest.raises(Unavailable):
            store.exists("read")
        assert reader.read() == DATA, "what is attached can be read without Cinder"
        reader.close()
        for name, each in held.items():
            error = each.end()
            assert isinstance(error, StoreError), f"{name}: {error!r}"
            assert error.temporary, f"{name}: {error!r}"
        started("--loop", "file", place=place)
        settle(project)
        names = {image.image_id for image in store.list()}
        assert {"commit", "read"} <= names <= {"commit", "read", "delete"}
        left = {item.image_id for item in store.uploads()}
        assert left >= {"attach", "write", "detach", "begun", "create", "read"}
        collect(store, project)
        for each in held.values():
            each.store.close()
        assert not list(store.uploads())
        for image in store.list():
            with store.get(image.location) as again:
                assert again.read() == DATA
            store.delete(image.location)
        assert project.names() == []


def settle(project: Project) -> None:
    """Give Cinder a while to go on with what it had begun."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not {each["status"] for each in project.volumes().values()} & {"creating", "deleting", "detaching"}:
            return
        time.sleep(0.2)


def collect(store: Store, project: Project) -> None:
    """What Cinder has forgotten stays in its state for ever; it is reported, and an administrator's to say so."""
    stuck = [key for key, each in project.volumes().items() if each["status"] in ("creating", "deleting")]
    if stuck:
        with pytest.raises(StoreTimeout, match=r"still (creating|deleting)"):
            store.collect(older_than=0, include_alive=True)
        for volume_id in stuck:
            project.reset(volume_id, "error")
    # The errors that are kept here hold on to their uploads.
    store.collect(older_than=0, include_alive=True)
    for volume_id in stuck:
        # An image whose deletion was asked for, and of which nobody knows whether it is whole.
        if volume_id in project.volumes():
            project.delete(volume_id)


def test_volume_that_is_not_found_any_more(project: Project) -> None:
    """Somebody deletes the volume of an upload: the add fails, and nothing is left."""
    with opened(project) as store:

        def source() -> Iterator[bytes]:
            yield DATA
            (volume_id,) = project.volumes()
            project.force(volume_id)
            yield DATA

        with pytest.raises(StoreError):
            store.add("image", source(), size=2 * len(DATA))
        with pytest.raises(NotFound):
            store.locate("image")
