"""The kit on the Cinder driver: volumes in RBD, which are file-like objects, and loop devices."""

from __future__ import annotations

import contextlib
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from cinder_testing import Project, driver, running

from imagestore.driver import Driver, Timeouts
from imagestore.testing import DriverConformance, Harness

TOKEN = "0123456789abcdef" * 2
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
        self.url = running()["CINDER_URL"]
        self.project = uuid.uuid4().hex
        self.admin = Project(self.url, self.project)
        self.foreign: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "silent"}

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
        attachment = self.admin.reserve(location.rpartition("/")[2])
        try:
            yield
        finally:
            self.admin.release(attachment)

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
        if hasattr(self, "silent"):
            self.silent.close()
        left = {key: each for key, each in self.admin.volumes().items() if key not in self.foreign}
        for key in self.foreign:
            self.admin.delete(key)
        assert not left, f"volumes stayed: {[(each['name'], each['status']) for each in left.values()]}"


class TestRbd(DriverConformance):
    harness = CinderHarness


class LoopHarness(CinderHarness):
    """Block devices: a path, and every byte is written."""

    kind = "loop-multi"
    settings: ClassVar[dict[str, Any]] = {}


class TestLoop(DriverConformance):
    harness = LoopHarness


class BoundHarness(CinderHarness):
    """No credentials of its own: it acts for whoever asks."""

    auths_apart = True

    def who(self) -> dict[str, Any]:
        return {}

    def auths(self) -> tuple[Any, Any]:
        return self._context(self.project), self._context(f"{self.project[:-4]}0000")

    def _context(self, project: str) -> Any:
        return SimpleNamespace(auth_token=f"user:{project}", project_id=project, user_id="user", service_catalog=[])


class TestBound(DriverConformance):
    harness = BoundHarness
