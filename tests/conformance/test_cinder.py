"""The kit on the Cinder driver: volumes in RBD, which are file-like objects, and loop devices."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from cinder_testing import Project, driver, running
from faultproxy import FaultProxy

from imagestore import Store
from imagestore.driver import Driver, Timeouts
from imagestore.testing import DriverConformance, Harness, checks, run_check

TOKEN = "0123456789abcdef" * 2
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
EVERYTHING = bool(os.environ.get("IMAGESTORE_EVERYTHING"))
"""Whether the whole kit runs on loop devices too, which takes ten minutes more."""
NOWHERE = "5b0f7d3c-0000-4000-8000-000000000001"


class CinderHarness(Harness):
    """A project of its own, and volumes in RBD that may be attached several times."""

    processes = True
    sdk = ("cinderclient", "keystoneauth1", "os_brick", "rados", "rbd", "boto3", "swiftclient", "requests")
    kill_rounds = 2
    # The test cluster forgets the watch of a dead client after four seconds.
    settle = 8.0
    kind: ClassVar[str] = "rbd-multi"
    settings: ClassVar[dict[str, Any]] = {"sparse": True}

    def __init__(self) -> None:
        server = running()["CINDER_URL"]
        self.project = uuid.uuid4().hex
        self.admin = Project(server, self.project)
        place = urlsplit(server)
        self.proxy = FaultProxy(str(place.hostname), int(place.port or 0))
        self.url = f"http://127.0.0.1:{self.proxy.port}{place.path}"
        self.foreign: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("silent", "proxy")}

    def make_driver(self) -> Driver:
        return driver(self.url, **self.who(), volume_type=self.kind, **self.settings)

    def who(self) -> dict[str, Any]:
        return {"noauth_project": self.project}

    def make_unreachable(self) -> Driver:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        return self._at(port)

    def make_stalled(self) -> Driver:
        # The backlog takes connections, and nobody ever reads from them.
        self.silent = socket.create_server(("127.0.0.1", 0))
        return self._at(self.silent.getsockname()[1])

    def _at(self, port: int) -> Driver:
        url = f"http://127.0.0.1:{port}/v3"
        return driver(url, noauth_project=self.project, timeouts=Timeouts(connect=1, stall=1))

    @contextlib.contextmanager
    def failing(self) -> Iterator[Callable[[], int]]:
        with self.proxy.answering(UNAVAILABLE) as requests:
            yield requests

    def plant_foreign(self) -> Callable[[], None]:
        if not self.foreign:
            for name, metadata in (
                ("database", {}),
                (f"imagestore-{TOKEN}", {"purpose": "none of ours"}),
                ("image-of-mine", {"image_id": "x", "image_size": "10"}),
                ("half", {"imagestore_upload": "not a token", "imagestore_image": "x"}),
            ):
                made = self.admin.create(name, metadata, self.kind)
                self.foreign[made] = self.admin.volumes()[made]

        def untouched() -> None:
            found = self.admin.volumes()
            for key, before in self.foreign.items():
                for field in ("name", "metadata", "status", "size"):
                    assert found[key][field] == before[field], f"{key}: {field}"

        return untouched

    @contextlib.contextmanager
    def hold(self, location: str) -> Iterator[None]:
        snapshot = self.admin.snapshot(location.rpartition("/")[2])
        try:
            yield
        finally:
            self.admin.delete_snapshot(snapshot)

    def hostile_locations(self) -> Iterable[str]:
        return (
            f"cinder://other/{NOWHERE}",
            f"cinder:///{NOWHERE}",
            f"cinder://kit/x/{NOWHERE}",
            f"cinder://kit/{NOWHERE}/",
            f"cinder://kit/{NOWHERE.upper()}",
            f"cinder://kit/{NOWHERE}?force=1",
            "cinder://kit/../volumes",
            "cinder://kit/%2e%2e/volumes",
            "cinder://kit/",
            "cinder://",
            f"rbd://{NOWHERE}",
        )

    def close(self) -> None:
        """Look whether anything of ours stayed, and take away what the tests made."""
        self.proxy.close()
        if hasattr(self, "silent"):
            self.silent.close()
        left = {key: each for key, each in self.admin.volumes().items() if key not in self.foreign}
        for key in self.foreign:
            self.admin.delete(key)
        assert not left, f"volumes stayed: {[(each['name'], each['status']) for each in left.values()]}"


class TestRbd(DriverConformance):
    """The contract's part runs behind Keystone, on the same kind of volumes."""

    harness = CinderHarness
    parts = ("faults", "leftovers")


class LoopHarness(CinderHarness):
    """Block devices: a path, and every byte is written."""

    kind = "loop-multi"
    settings: ClassVar[dict[str, Any]] = {}


class TestLoop(DriverConformance):
    """The parts that say more of the driver than of the backend; and below some of the others."""

    harness = LoopHarness
    parts = DriverConformance.parts if EVERYTHING else ("discipline", "locations")

    def test_discipline_many_threads(self) -> None:
        """As the kit's, with fewer threads: all of this Cinder is one process, and would take minutes for those."""
        assert self._harness is not None
        over = threading.Event()
        with Store(self._harness.make_driver(), name="kit") as store:

            def look() -> None:
                while not over.wait(0.2):
                    list(store.list())
                    list(store.uploads())
                    store.usage()

            def work(number: int) -> None:
                data = b"%d" % number * 100_000
                location = store.add(f"image-{number}", data).location
                for start in (0, 5):
                    with store.get(location, start=start) as reader:
                        assert reader.read() == data[start:]
                store.delete(location)

            with ThreadPoolExecutor() as pool:
                looker = pool.submit(look)
                workers = [pool.submit(work, number) for number in range(5)]
                try:
                    for worker in workers:
                        worker.result()
                finally:
                    over.set()
                looker.result()
            assert not list(store.list())
            assert not list(store.uploads())


def test_all_that_is_known_of_the_host(tmp_path: Path) -> None:
    """With the connector that iSCSI and others need, of a process that is root."""
    made = LoopHarness()
    values = {"connector": "host", "root_helper": "", "lock_path": str(tmp_path), "volume_type": "loop"}
    try:
        with Store(driver(made.url, **made.who(), **values), name="kit") as store:
            location = store.add("image", b"data").location
            with store.get(location) as reader:
                assert reader.read() == b"data"
            store.delete(location)
    finally:
        made.close()


class BoundHarness(CinderHarness):
    """No credentials of its own: it acts for whoever asks."""

    auths_apart = True

    def who(self) -> dict[str, Any]:
        return {}

    def auths(self) -> tuple[Any, Any]:
        return self._context(self.project), self._context(f"{self.project[:-4]}0000")

    def _context(self, project: str) -> Any:
        return SimpleNamespace(auth_token=f"user:{project}", project_id=project, user_id="user", service_catalog=[])


ON_DEVICES = (
    "contract.image_empty",
    "contract.image_several_blocks_and_some",
    "contract.zeros_scattered",
    "contract.ranges",
    "contract.unfinished_is_invisible",
    "faults.source_dies_middle",
    "faults.commit_in_doubt_done",
    "faults.abort_fails",
    "faults.read_resumed",
    "leftovers.discard_twice",
    "leftovers.foreign_objects",
    "leftovers.process_killed",
)
BOUND = (
    "contract.image_one_byte",
    "contract.two_auths",
    "contract.unbound",
    "contract.listing",
    "faults.commit_in_doubt_lost",
    "leftovers.discard_twice",
    "leftovers.foreign_objects",
)


@pytest.mark.parametrize(("harness", "some"), [(LoopHarness, ON_DEVICES), (BoundHarness, BOUND)])
def test_some_of_it_elsewhere(harness: type[CinderHarness], some: tuple[str, ...]) -> None:
    made = harness()
    try:
        for check in checks():
            if check.id in some:
                run_check(check, made)
    finally:
        made.close()


def test_every_one_of_some_is_a_check() -> None:
    assert {*ON_DEVICES, *BOUND} <= {check.id for check in checks()}
