"""The kit on the memory driver, in each of its personalities."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, ClassVar

from imagestore.driver import Driver, Options
from imagestore.drivers.memory import Backend, MemoryDriver
from imagestore.testing import DriverConformance, Harness

KIB = 1024


class CountingBackend(Backend):
    requests = 0

    def _request(self, operation: str, session: int) -> Any:
        self.requests += 1
        return super()._request(operation, session)


class MemoryHarness(Harness):
    sdk = ("boto3", "swiftclient", "cinderclient", "pymongo", "keystoneauth1", "requests")
    personality: ClassVar[str]
    block_size: ClassVar[int] = 64 * KIB
    require_auth: ClassVar[bool] = False
    tells_alive: ClassVar[bool] = True

    def __init__(self) -> None:
        self.backend = CountingBackend()
        self.backend.tells_alive = self.tells_alive
        self.planted: set[tuple[str, str]] = set()

    def make_driver(self) -> Driver:
        return self._driver(self.backend)

    def make_unreachable(self) -> Driver:
        gone = Backend()
        gone.reachable = False
        return self._driver(gone)

    def close(self) -> None:
        left = {key for key in self.backend.inventory() if key not in self.planted}
        assert not left, f"the kit left {left}"

    def _driver(self, backend: Backend) -> Driver:
        settings = Options(
            {
                "personality": self.personality,
                "capacity": None,
                "block_size": self.block_size,
                "require_auth": self.require_auth,
            }
        )
        return MemoryDriver(settings, store="kit", backend=backend)

    def plant_foreign(self) -> Callable[[], None]:
        before = set(self.backend.inventory())
        driver = self.make_driver()
        assert isinstance(driver, MemoryDriver)
        driver.open()
        untouched = driver.plant_foreign()
        self.planted |= set(self.backend.inventory()) - before
        return untouched

    @contextlib.contextmanager
    def failing(self) -> Iterator[Callable[[], int]]:
        before = self.backend.requests
        self.backend.reachable = False
        yield lambda: self.backend.requests - before
        self.backend.reachable = True

    def hold(self, location: str) -> AbstractContextManager[None]:
        return self.backend.hold(location.rpartition("/")[2])

    def hostile_locations(self) -> Iterable[str]:
        return (
            "memory://other/image",
            "memory:///image",
            "memory://kit/",
            "memory://kit/../other/image",
            "memory://kit/a/b",
            "memory://kit/.hidden",
            "memory://kit/%2e%2e",
            "memory://kit/a?x=y",
            "memory://kit/a#x",
            "memory://kit.other/image",
        )


def _harness(personality: str, **attributes: Any) -> type[MemoryHarness]:
    name = personality.title().replace("-", "") + "Harness"
    return type(name, (MemoryHarness,), {"personality": personality, "__module__": __name__, **attributes})


class TestPlain(DriverConformance):
    harness = _harness("plain")


class TestS3(DriverConformance):
    harness = _harness("s3")


class TestS3Unconditional(DriverConformance):
    harness = _harness("s3-unconditional", tells_alive=False)


class TestSwift(DriverConformance):
    harness = _harness("swift", tells_alive=False)


class TestCinder(DriverConformance):
    harness = _harness("cinder")


class TestCinderPerRequest(DriverConformance):
    harness = _harness(
        "cinder",
        require_auth=True,
        auths_apart=True,
        auths=lambda self: tuple(
            SimpleNamespace(auth_token=f"t{n}", user_id=f"u{n}", project_id=f"p{n}", service_catalog=[]) for n in (1, 2)
        ),
    )


class TestSheepdog(DriverConformance):
    harness = _harness("sheepdog")


class TestGridFS(DriverConformance):
    harness = _harness("gridfs")


class TestVMware(DriverConformance):
    harness = _harness("vmware")
