"""The kit on the Sheepdog driver: a node with all of Sheepdog's traps, and a real cluster where there is one."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from imagestore import Store, open_store
from imagestore.driver import Driver, Options, Timeouts
from imagestore.drivers.sheepdog import SheepdogDriver
from imagestore.errors import InUse, NotFound, Unsupported
from imagestore.testing import DriverConformance, Harness

SERVERS = Path(__file__).parents[1] / "servers"
sys.path.insert(0, str(SERVERS))

from sheepdog_server import HALTED, NOT_FORMATTED, WAITING, Sheepdog  # noqa: E402 - from where the servers are

pytestmark = pytest.mark.filterwarnings("error")

SDK = ("boto3", "swiftclient", "cinderclient", "pymongo", "requests", "rados", "rbd")
MIB = 1 << 20
TOKEN = "0123456789abcdef0123456789abcdef"


def _driver(node: str, *, timeouts: Timeouts | None = None, **options: Any) -> SheepdogDriver:
    values = {option.dest: option.default for option in SheepdogDriver.options}
    host, _, port = node.rpartition(":")
    settings = Options({**values, "host": host, "port": int(port), **options})
    return SheepdogDriver(settings, store="kit", timeouts=timeouts or Timeouts(connect=5, stall=20))


class SheepdogHarness(Harness):
    """A node in this process; another process can reach it."""

    processes = True
    sdk = SDK
    shift: ClassVar[int] = 20
    recycle: ClassVar[bool] = False
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self.server = Sheepdog(shift=self.shift, recycle=self.recycle)
        self.node = self.server.node
        self.deaf = socket.create_server(("127.0.0.1", 0))

    def __getstate__(self) -> dict[str, Any]:
        return {"node": self.node}

    def make_driver(self) -> Driver:
        return _driver(self.node, **self.options)

    def make_unreachable(self) -> Driver:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        return _driver(f"127.0.0.1:{port}", timeouts=Timeouts(connect=1, stall=1), nodes=[f"127.0.0.1:{port}"])

    def make_stalled(self) -> Driver:
        return _driver(f"127.0.0.1:{self.deaf.getsockname()[1]}", timeouts=Timeouts(connect=0.5, stall=0.5))

    @contextlib.contextmanager
    def failing(self) -> Iterator[Callable[[], int]]:
        before = len(self.server.log)
        self.server.state = NOT_FORMATTED
        try:
            yield lambda: len(self.server.log) - before
        finally:
            self.server.state = 0

    @contextlib.contextmanager
    def hold(self, location: str) -> Iterator[None]:
        name = location.rpartition(":")[2]
        self.server.snapshot(name)
        try:
            yield
        finally:
            self.server.remove(name, snapshots=True)

    def plant_foreign(self) -> Callable[[], None]:
        prefix = self.options.get("prefix", "")
        limit = 1 << 20 << self.shift
        # Each one looks like something of ours, and lacks something.
        planted: dict[str, dict[str, Any]] = {
            "disk of vm 1": {},
            "volume-6b1d": {},
            "tagged": {"tag": b"imagestore"},
            "upload": {"tag": b"imagestore-upload:"},
            "short": {"tag": b"imagestore-upload:0123456789abcdef"},
            "capitals": {"tag": b"imagestore-upload:" + TOKEN.upper().encode()},
            "elsewhere": {"tag": b" imagestore-upload:" + TOKEN.encode()},
            "longer": {"tag": b"imagestore-upload:" + TOKEN.encode() + b" 17 and more"},
            "delete": {"tag": b"imagestore-delete:" + TOKEN.encode()},
            "discard": {"tag": bytes(96) + b"imagestore-discard:" + TOKEN.encode()},
            "thin": {"size": limit},
            "odd": {"size": limit // 2 + 12345},
            "small-odd": {"size": 0x7D06D},
            "hyper": {"hyper": True},
            ".hidden": {},
            "-p1": {},
        }
        # Another store's upload: its names don't begin as ours do.
        if prefix:
            planted["another-store"] = {"tag": b"imagestore-upload:" + TOKEN.encode()}
        for name, how in planted.items():
            full = name if name in ("disk of vm 1", ".hidden", "-p1", "another-store") else prefix + name
            if self.server.vdi(full) is None:
                self.server.plant(full, name.encode() * 100_000, **how)
        self.server.plant(f"{prefix}deleted", b"")
        self.server.remove(f"{prefix}deleted", snapshots=False)
        if self.server.vdi(f"{prefix}frozen") is None:
            # A snapshot whose name says more than its tag should.
            self.server.plant(f"{prefix}frozen", b"frozen")
            self.server.snapshot(f"{prefix}frozen", b"imagestore-upload:" + TOKEN.encode())
        names = [name for name in self.server.names() if "kit" not in name]
        before = {name: self.server.state_of(name) for name in names}

        def untouched() -> None:
            assert {name: self.server.state_of(name) for name in names} == before

        return untouched

    def hostile_locations(self) -> Iterable[str]:
        port = self.node.rpartition(":")[2]
        address = f"127.0.0.1:{port}"
        name = self.options.get("prefix", "") + "canary"
        return (
            f"sheepdog://127.0.0.2:{port}:{name}",
            f"sheepdog://localhost:{port}:{name}",
            f"sheepdog://127.0.0.1.:{port}:{name}",
            f"sheepdog://127.1:{port}:{name}",
            f"sheepdog://2130706433:{port}:{name}",
            f"sheepdog://[::ffff:127.0.0.1]:{port}:{name}",
            f"sheepdog://127.0.0.1:1:{name}",
            f"sheepdog://127.0.0.1:{int(port) + 65536}:{name}",
            f"sheepdog://127.0.0.1:-{port}:{name}",
            f"sheepdog://127.0.0.1:+{port}:{name}",
            f"sheepdog://127.0.0.1::{name}",
            f"sheepdog://:{port}:{name}",
            f"sheepdog://{port}:{name}",
            f"sheepdog://{address}/{name}",
            f"sheepdog://{address}:",
            f"sheepdog://{address}:-p1",
            f"sheepdog://{address}:disk of vm 1",
            f"sheepdog://{address}:{name}\n",
            f"sheepdog://{address}:{name}%00",
            f"sheepdog://{address}:a/{name}",
            f"sheepdog://{address}:{name}?x",
            f"sheepdog://{address}:{'x' * 256}",
            f"sheepdog://{address}:x:{name}",
            f"sheepdog:{address}:{name}",
        )

    @contextlib.contextmanager
    def canary(self) -> Iterator[None]:
        name = self.options.get("prefix", "") + "canary"
        self.server.plant(name, b"alive" * 1000)
        before = self.server.state_of(name)
        yield
        assert self.server.state_of(name) == before
        self.server.remove(name, snapshots=False)

    def close(self) -> None:
        self.deaf.close()
        self.server.stop()
        assert not self.server.violations, self.server.violations[:10]
        # What a killed uploader was sending may arrive after its VDI was collected.
        if not self.server.strays:
            assert not self.server.orphans(), f"{len(self.server.orphans())} objects leaked"


class TestSheepdog(DriverConformance):
    harness = SheepdogHarness


class RecycledHarness(SheepdogHarness):
    recycle = True
    kill_rounds = 3
    options: ClassVar[dict[str, Any]] = {"prefix": "img-"}


class TestRecycledIds(DriverConformance):
    """A cluster that gives the ids of deleted VDIs away again, and a store of some of its VDIs only."""

    harness = RecycledHarness
    parts = ("contract", "faults", "leftovers", "locations")


class DefaultHarness(SheepdogHarness):
    shift = 22


class TestObjectsOf4MiB(DriverConformance):
    """As clusters are by default. Images get long with it."""

    harness = DefaultHarness
    parts = ("contract",)


# A real cluster


class RealHarness(SheepdogHarness):
    """One ``sheep`` with a directory of its own. What only an imitation can be made to do is left out."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="imagestore-sheep-"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.node = f"127.0.0.1:{port}"
        self.process = subprocess.Popen(
            ["sheep", "-n", "-f", "-c", "local", "-b", "127.0.0.1", "-y", "127.0.0.1", "-p", str(port), self.place],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 20
        while self.dog("cluster", "format", "-c", "1").returncode != 0:
            assert time.monotonic() < end, "sheep does not start"
            time.sleep(0.2)
        self.deaf = socket.create_server(("127.0.0.1", 0))

    def dog(self, *arguments: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        host, _, port = self.node.rpartition(":")
        command = ["dog", *arguments[:2], "-a", host, "-p", port, *arguments[2:]]
        return subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)

    failing = Harness.failing
    plant_foreign = Harness.plant_foreign
    canary = Harness.canary

    @contextlib.contextmanager
    def hold(self, location: str) -> Iterator[None]:
        name = location.rpartition(":")[2]
        assert self.dog("vdi", "snapshot", "-s", "held", name).returncode == 0
        yield
        assert self.dog("vdi", "delete", "-s", "held", name).returncode == 0

    def close(self) -> None:
        self.deaf.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        shutil.rmtree(self.place)


@pytest.mark.skipif(
    shutil.which("sheep") is None or shutil.which("dog") is None,
    reason="sheep: no distribution has it any more; put sheep and dog of 1.0 on PATH to prove the driver on them",
)
class TestRealSheep(DriverConformance):
    harness = RealHarness

    def test_dog_agrees(self) -> None:
        assert isinstance(self._harness, RealHarness)
        data = os.urandom(9 * MIB + 5)
        with Store(self._harness.make_driver()) as store:
            location = store.add("dog", data).location
            assert self._harness.dog("vdi", "read", "dog").stdout == data
            assert self._harness.dog("vdi", "check", "dog").returncode == 0
            store.delete(location)
            assert self._harness.dog("vdi", "list", "-r", "dog").stdout == b""
            assert self._harness.dog("vdi", "create", "theirs", str(len(data))).returncode == 0
            assert self._harness.dog("vdi", "write", "theirs", "0", str(len(data)), data=data).returncode == 0
            with store.get(store.locate("theirs")) as reader:
                assert reader.read() == data


# What the kit does not ask for


@pytest.fixture
def server() -> Iterator[Sheepdog]:
    with Sheepdog() as server:
        yield server
        assert not server.violations
        assert not server.orphans()


@pytest.fixture
def store(server: Sheepdog) -> Iterator[Store]:
    with open_store("sheepdog", host=server.host, port=server.port) as store:
        yield store


def test_images_of_other_programs(server: Sheepdog, store: Store) -> None:
    data = os.urandom(3 * MIB + 77)
    server.plant("glance", data)
    for location in (f"sheepdog://{server.node}:glance", "sheepdog://glance"):
        assert store.get_size(location) == len(data)
        with store.get(location) as reader:
            assert reader.read() == data
    assert [image.image_id for image in store.list()] == ["glance"]
    store.delete("sheepdog://glance")
    assert not server.objects
    with pytest.raises(NotFound):
        store.stat("sheepdog://glance")


def test_a_clone_is_read_through_its_parent(server: Sheepdog, store: Store) -> None:
    data = os.urandom(3 * MIB)
    location = store.add("image", data).location
    before = store.stat(location).version
    server.snapshot("image")
    assert store.stat(location).version != before
    with store.get(location) as reader:
        assert reader.read() == data
    with pytest.raises(InUse, match="snapshots"):
        store.delete(location)
    server.remove("image", snapshots=True)
    store.delete(location)


def test_snapshots_that_outlived_their_image(server: Sheepdog, store: Store) -> None:
    """A new image of the name must not be deleted beside the old one's snapshots either: they can't be told apart."""
    store.add("image", b"old")
    server.snapshot("image")
    server.remove("image", snapshots=False)
    assert not store.exists("image")
    location = store.add("image", b"new").location
    with pytest.raises(InUse):
        store.delete(location)
    server.remove("image", snapshots=True)


def test_hypervolumes_are_left_alone(server: Sheepdog, store: Store) -> None:
    server.plant("hyper", b"x" * MIB, hyper=True)
    for ask in (store.stat, store.get, store.delete):
        with pytest.raises(Unsupported, match="hypervolume"):
            ask("sheepdog://hyper")
    assert list(store.list()) == []
    server.remove("hyper", snapshots=False)
    server.violations.clear()


def test_holes_are_kept_both_ways(server: Sheepdog, store: Store, tmp_path: Path) -> None:
    data = bytearray(60 * MIB + 100)
    for place in (0, 7, 8, 41):
        data[place * MIB : place * MIB + 10] = b"0123456789"
    result = store.add("sparse", bytes(data))
    assert result.stored == 4 * MIB
    assert server.objects == 4
    assert server.faults_of("sparse") == []
    before = len(server.log)
    store.download(result.location, tmp_path / "sparse")
    assert (tmp_path / "sparse").read_bytes() == data
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 6 * MIB
    # Of the 60 objects, only those that are there are asked for; the rest are questions for heads and tables.
    assert server.log[before:].count("read") < 50
    store.delete(result.location)
    assert not server.objects


def test_the_table_names_what_is_there(server: Sheepdog, store: Store) -> None:
    """Entries are written in advance; none is left that has no object, nor beyond the end."""
    for number, size in enumerate((0, 1, MIB, 5 * MIB + 3, 34 * MIB + 1)):
        data = os.urandom(size)
        for known in (True, False):
            name = f"image-{number}-{known}"
            store.add(name, iter([data]), size=size if known else None)
            assert server.faults_of(name) == []
            vdi = server.vdi(name)
            assert vdi is not None
            assert vdi.size == size
            assert vdi.head[256:512] == bytes(256)
            assert len(vdi.table) == -(-size // MIB)
            store.delete(store.locate(name))
    assert not server.objects
    assert not [line for line in server.complaints if "is not there" not in line]


@pytest.mark.parametrize("state", [NOT_FORMATTED, WAITING, HALTED])
def test_a_cluster_that_is_not_ready_has_lost_nothing(server: Sheepdog, store: Store, state: int) -> None:
    from imagestore._models import Retry
    from imagestore.errors import Unavailable

    location = store.add("image", b"data").location
    server.state = state
    with open_store("sheepdog", host=server.host, port=server.port, retry=Retry(attempts=1)) as other:
        for ask in (other.stat, other.get, other.delete):
            with pytest.raises(Unavailable):
                ask(location)
        for ask in (other.exists, lambda name: other.add(name, b"x")):
            with pytest.raises(Unavailable):
                ask("image")
        with pytest.raises(Unavailable):
            list(other.list())
    server.state = 0
    assert store.get_size(location) == 4
    store.delete(location)
