"""The kit on the Swift driver: OpenStack Swift with both ways of logging in, and Ceph's gateway."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _swift_testing import application_credential, context, options, running
from faultproxy import FaultProxy

from imagestore.driver import Driver, Timeouts
from imagestore.drivers.swift import SwiftDriver
from imagestore.testing import DriverConformance, Harness, NotApplicable

pytestmark = pytest.mark.filterwarnings("error")

TOKEN = "0123456789abcdef0123456789abcdef"
EVERYTHING = bool(os.environ.get("IMAGESTORE_EVERYTHING"))
"""Whether also those slow checks run on Keystone in which nothing depends on who logs in, and where."""
HEAVY = ("memory", "many_threads", "many_reading_threads", "nothing_kept")


class SwiftHarness(Harness):
    """One container of tempauth's account."""

    processes = True
    trailing = 0.7
    sdk = ("swiftclient", "keystoneauth1", "requests", "urllib3", "boto3")
    script: ClassVar[str] = "swift"
    conditional: ClassVar[bool] = True

    def __init__(self) -> None:
        self.server = running(self.script)
        self.container = f"kit-{uuid.uuid4().hex[:12]}"
        self.proxy = FaultProxy(*self.target())
        self.settings = self.make_settings(f"http://127.0.0.1:{self.proxy.port}")
        self.planted: set[str] = set()
        driver = self.make_driver()
        driver.open()
        driver.close()

    def target(self) -> tuple[str, int]:
        """Host and port of the server."""
        parts = urlsplit(self.server["SWIFT_PROXY"])
        return parts.hostname or "", parts.port or 80

    def make_settings(self, proxy: str) -> dict[str, Any]:
        return {
            "auth_version": "1",
            # The storage URL that the server gives has the address that it was asked at.
            "auth_url": f"{proxy}/auth/v1.0",
            "user": self.server["ST_USER"],
            "key": self.server["ST_KEY"],
            "container": self.container,
            "create_container": True,
        }

    def make_driver(self) -> Driver:
        return self._driver(self.settings)

    def _driver(self, settings: dict[str, Any], timeouts: Timeouts | None = None) -> Driver:
        return SwiftDriver(options(**settings), store="kit", timeouts=timeouts)

    def make_unreachable(self) -> Driver:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        return self._at(port)

    def _at(self, port: int) -> Driver:
        """The same with all requests to another port of this host."""
        url = f"http://127.0.0.1:{port}"
        settings = {**self.settings, "auth_url": f"{url}/auth/v1.0", "endpoint": f"{url}/v1/AUTH_x"}
        return self._driver(settings, Timeouts(connect=1, stall=1))

    def make_stalled(self) -> Driver:
        silent = socket.create_server(("127.0.0.1", 0))
        self.silent = silent
        return self._at(silent.getsockname()[1])

    def __getstate__(self) -> dict[str, Any]:
        # Another process goes through the proxy in this one.
        return {name: value for name, value in self.__dict__.items() if name not in ("silent", "proxy")}

    def close(self) -> None:
        silent = self.__dict__.pop("silent", None)
        if silent is not None:
            silent.close()
        with self.client() as client:
            for container in list(client.driver._containers()):
                left = [entry["name"] for entry in container.entries()]
                # Claims of discarded uploads end by themselves, and are listed until somebody clears them away.
                kept = [name for name in left if name not in self.planted and not name.endswith(".claim")]
                assert not kept, f"the kit left {kept}"
                for name in left:
                    container.remove(name)
                container.remove_container()
        self.proxy.close()

    @contextlib.contextmanager
    def client(self) -> Iterator[Raw]:
        driver = self.make_driver()
        driver.open()
        assert isinstance(driver, SwiftDriver)
        try:
            yield Raw(driver, self.foreign_container())
        finally:
            driver.close()

    def foreign_container(self) -> str:
        return self.container

    def plant_foreign(self) -> Callable[[], None]:
        names = [
            "folder/object",
            ".hidden",
            ".imagestore",
            ".imagestore/marks/",
            ".imagestore/marks/text",
            f".imagestore/marks/{TOKEN}",
            f".imagestore/marks/{TOKEN}x",
            f".imagestore/marks/{TOKEN}.claim.old",
            f".imagestore/{TOKEN}/00000000",
            f".imagestore/{TOKEN}",
            f".imagestore-old/marks/{TOKEN}",
            f"other/.imagestore/marks/{TOKEN}",
        ]
        self.planted |= set(names)
        with self.client() as client:
            for name in names:
                client.put(name, name.encode())

        def untouched() -> None:
            with self.client() as client:
                for name in names:
                    assert client.get(name) == name.encode(), name

        return untouched

    @contextlib.contextmanager
    def failing(self) -> Iterator[Callable[[], int]]:
        # Without "close" the next request may come on a connection that the proxy is about to end.
        answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        with self.proxy.answering(answer) as count:
            yield count

    def hostile_locations(self) -> Iterable[str]:
        root = self.settings["auth_url"].removeprefix("http://")
        own = self.container
        return (
            f"swift+http://evil.example/auth/v1.0/{own}/image",
            f"swift+http://127.0.0.1:1/auth/v1.0/{own}/image",
            f"swift+https://{root}/{own}/image",
            f"swift://{root}/{own}/image",
            f"swift+http://{root}/{own}-other/image",
            f"swift+http://{root}/other/image",
            f"swift+http://{root}/{own}/../other/image",
            f"swift+http://{root}/other/../{own}/image",
            f"swift+http://{root}/{own}/..",
            f"swift+http://{root}/{own}/.imagestore",
            f"swift+http://{root}/{own}/.imagestore/marks/{TOKEN}",
            f"swift+http://{root}/{own}/folder/object",
            f"swift+http://{root}/{own}/",
            f"swift+http://{root}/{own}",
            f"swift+http://{root}/{own}/image?multipart-manifest=get",
            f"swift+http://{root}/{own}/image#x",
            f"swift+http://{root}/{own}/%69mage",
            f"swift+http://{root}//{own}/image",
            f"swift+http://{root}/x/{own}/image",
            f"swift+config://ref1/{own}/image",
            f"swift+http://{root}/{own}://{root}/{own}/image",
        )


class Raw:
    """Requests of a test to the container, past the driver's verbs."""

    def __init__(self, driver: SwiftDriver, container: str) -> None:
        self.driver = driver
        driver._client(driver._reference)
        self.container = driver._container(driver._reference, container)
        self.container.make = {}

    def entries(self) -> Iterator[dict[str, Any]]:
        return self.container.entries()

    def put(self, name: str, data: bytes) -> None:
        self.container.put(name, data, {})

    def get(self, name: str) -> bytes:
        return bytes(self.container.client("GET", self.container.path(name)).body)


class TestTempauth(DriverConformance):
    harness = SwiftHarness


class KeystoneHarness(SwiftHarness):
    """A project of Keystone's, by password."""

    def target(self) -> tuple[str, int]:
        parts = urlsplit(self.server["SWIFT_PROXY_V3"])
        return parts.hostname or "", parts.port or 80

    def make_settings(self, proxy: str) -> dict[str, Any]:
        server = self.server
        return {
            "auth_url": server["OS_AUTH_URL"],
            "user": f"{server['OS_PROJECT_NAME']}:{server['OS_USERNAME']}",
            "key": server["OS_PASSWORD"],
            "region": server["OS_REGION_NAME"],
            # The catalog knows only the server itself.
            "endpoint": f"{proxy}/v1/AUTH_{server['OS_PROJECT_ID']}",
            "container": self.container,
            "create_container": True,
        }


class AccountsHarness(KeystoneHarness):
    """An accounts file, as Glance has it, an application credential, and containers by seed."""

    kill_rounds = 2

    def make_settings(self, proxy: str) -> dict[str, Any]:
        settings = super().make_settings(proxy)
        made = application_credential(self.server)
        self.file = Path(tempfile.mkdtemp(prefix="imagestore-accounts-")) / "accounts.conf"
        self.file.write_text(
            f"[kit]\nauth_address = {settings['auth_url']}\n"
            f"application_credential_id = {made['id']}\napplication_credential_secret = '{made['secret']}'\n"
            f"[other]\nauth_address = {settings['auth_url']}\nuser = {settings['user']}\nkey = wrong\n"
        )
        kept = {key: settings[key] for key in ("endpoint", "container", "create_container")}
        return {**kept, "accounts_file": str(self.file), "reference": "kit", "containers_seed": 1}

    def foreign_container(self) -> str:
        # Where the kit's images are: their ids begin with a k.
        return f"{self.container}_k"

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.file.parent)

    def _at(self, port: int) -> Driver:
        settings = {**self.settings, "endpoint": f"http://127.0.0.1:{port}/v1/AUTH_x"}
        return self._driver(settings, Timeouts(connect=1, stall=1))

    def hostile_locations(self) -> Iterable[str]:
        own = self.container
        return (
            f"swift+config://kit/{own}/image",
            f"swift+config://kit/{own}_a/image",
            f"swift+config://kit/{own}_im/image",
            f"swift+config://nobody/{own}_i/image",
            f"swift+config://kit/../{own}_i/image",
            f"swift+config://kit//{own}_i/image",
            f"swift+config://kit/other/{own}_i/image",
            f"swift+config:///{own}_i/image",
            f"swift+http://kit/{own}_i/image",
            f"swift+config://kit/{own}_./.imagestore",
        )


class TestKeystone(DriverConformance):
    harness = AccountsHarness
    parts = DriverConformance.parts if EVERYTHING else ("contract", "leftovers", "discipline", "locations")


class MultiTenantHarness(KeystoneHarness):
    """Every image in a container of its own in its user's account."""

    kill_rounds = 2
    auths_apart = True

    def make_settings(self, proxy: str) -> dict[str, Any]:
        return {"multi_tenant": True, "container": self.container, "region": self.server["OS_REGION_NAME"]}

    def auths(self) -> tuple[Any, Any]:
        if not hasattr(self, "contexts"):
            self.contexts = tuple(context(self.server, prefix, self.proxy.port) for prefix in ("OS", "OS2"))
        return self.contexts

    def make_unreachable(self) -> Driver | None:
        """Without a user there is no server to reach."""
        return None

    def make_stalled(self) -> Driver:
        raise NotApplicable("a store without a user has no server")

    def hostile_locations(self) -> Iterable[str]:
        proxy = f"127.0.0.1:{self.proxy.port}"
        account = f"AUTH_{self.server['OS_PROJECT_ID']}"
        own = f"{self.container}_image"
        return (
            f"swift+http://evil.example/v1/{account}/{own}/image",
            f"swift+http://127.0.0.1:1/v1/{account}/{own}/image",
            f"swift+https://{proxy}/v1/{account}/{own}/image",
            f"swift+http://{proxy}/v1/{account}/{own}/other",
            f"swift+http://{proxy}/v1/{account}/{self.container}/image",
            f"swift+http://{proxy}/v1/{account}/other_image/image",
            f"swift+http://{proxy}/v1/{account}/../x/{own}/image",
            f"swift+http://{proxy}/v1/{own}/image",
            f"swift+http://{proxy}/v2/{account}/{own}/image",
            f"swift+http://{proxy}/{account}/{own}/image",
            f"swift+config://ref1/{own}/image",
        )

    @contextlib.contextmanager
    def client(self) -> Iterator[Raw]:
        raise NotApplicable("there are many containers")
        yield

    def plant_foreign(self) -> Callable[[], None]:
        raise NotApplicable("its containers hold one image each")

    def close(self) -> None:
        driver = self.make_driver()
        driver.open()
        assert isinstance(driver, SwiftDriver)
        for auth in self.auths():
            bound = driver.bind(auth)
            assert isinstance(bound, SwiftDriver)
            for container in bound._containers():
                left = [entry["name"] for entry in container.entries()]
                assert all(name.endswith(".claim") for name in left), f"the kit left {container.name}: {left}"
                for name in left:
                    container.remove(name)
                container.remove_container()
        driver.close()
        self.proxy.close()


class TestMultiTenant(DriverConformance):
    harness = MultiTenantHarness


if not EVERYTHING:
    for _heavy in HEAVY:
        setattr(TestKeystone, f"test_discipline_{_heavy}", None)
        setattr(TestMultiTenant, f"test_discipline_{_heavy}", None)


class CephHarness(SwiftHarness):
    """Ceph's gateway: no If-None-Match, no nested manifests, no ranges in copies."""

    script = "ceph"
    kill_rounds = 2

    def target(self) -> tuple[str, int]:
        parts = urlsplit(self.server["SWIFT_AUTH_URL"])
        return parts.hostname or "", parts.port or 80

    def make_settings(self, proxy: str) -> dict[str, Any]:
        return {
            "auth_version": "1",
            "auth_url": f"{proxy}{urlsplit(self.server['SWIFT_AUTH_URL']).path}",
            "user": self.server["SWIFT_USER"],
            "key": self.server["SWIFT_KEY"],
            "container": self.container,
            "create_container": True,
        }


class TestCeph(DriverConformance):
    harness = CephHarness
