"""The kit on the VMware driver: on the vendor's own simulator, and on the same one behind strict access to files."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from imagestore import Store
from imagestore.driver import Driver, Timeouts
from imagestore.errors import StoreError
from imagestore.testing import DriverConformance, Harness

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from vmware_testing import Datastores

pytest.importorskip("pyVmomi", reason="the VMware driver needs pyVmomi")
pytestmark = pytest.mark.filterwarnings("error")

TOKEN = "0123456789abcdef" * 2
# For servers that differ in how an image comes in and goes out.
TRANSFERS = ("contract", "faults", "leftovers")


class VMwareHarness(Harness):
    processes = True
    sdk = ("pyVmomi", "pyVim", "requests", "urllib3", "boto3", "swiftclient", "pymongo")
    server: ClassVar[str] = "strict"
    stores: ClassVar[tuple[str, ...]] = ("DC0:LocalDS_0",)

    def __init__(self) -> None:
        self.datastores = Datastores(self.server, self.stores)
        self.foreign: dict[str, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What a child process gets; sockets stay here.
        return {name: value for name, value in self.__dict__.items() if name != "silent"}

    def make_driver(self) -> Driver:
        return self.datastores.driver()

    def make_unreachable(self) -> Driver:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        return self.datastores.driver(host=f"127.0.0.1:{port}", timeouts=Timeouts(connect=1, stall=1))

    def make_stalled(self) -> Driver:
        # The backlog takes connections, and nobody ever reads from them.
        self.silent = socket.create_server(("127.0.0.1", 0))
        port = self.silent.getsockname()[1]
        return self.datastores.driver(host=f"127.0.0.1:{port}", timeouts=Timeouts(connect=1, stall=1))

    def close(self) -> None:
        """Take everything away, after a look whether anything of ours stayed."""
        if hasattr(self, "silent"):
            self.silent.close()
        left = self.datastores.files() - self.foreign.keys()
        self.datastores.remove()
        assert not left, f"files stayed: {sorted(left)}"

    def plant_foreign(self) -> Callable[[], None]:
        root = self.datastores.path()
        names = (
            ".hidden", ".imagestore-", ".imagestore-xyz.part", ".imagestore-xyz.claim", ".imagestore-x.y.claim",
            f".imagestore-{TOKEN}.part.bak", f".imagestore-{TOKEN}.notes", f".imagestore-{TOKEN[1:]}.mark", "a b",
            "disk.vmdk", "disk-flat.VMDK", "vm/vm.vmx", "vm/vm.vmdk", f"vm/.imagestore-{TOKEN}.part", "-x", "x~",
        )  # fmt: skip
        for name in names:
            self.foreign[name] = name.encode()
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())

        def untouched() -> None:
            for name in names:
                assert (root / name).read_bytes() == name.encode(), name

        return untouched

    def hostile_locations(self) -> Iterable[str]:
        host, directory = self.datastores.address, self.datastores.directory
        here, tail = f"vsphere://{host}/folder/{directory}", "?dsName=LocalDS_0&dcPath=DC0"
        return (
            f"vsphere://evil.example/folder/{directory}/canary{tail}",
            f"vsphere://{host}.evil.example/folder/{directory}/canary{tail}",
            f"vsphere://evil.example/{host}/folder/{directory}/canary{tail}",
            f"vsphere://127.0.0.1/folder/{directory}/canary{tail}",
            f"vsphere://{host}/{directory}/canary{tail}",
            f"vsphere://{host}/folder/canary{tail}",
            f"vsphere://{host}/folder//{directory}/canary{tail}",
            f"{here}/../canary{tail}",
            f"{here}/%2e%2e/canary{tail}",
            f"{here}/..%2fcanary{tail}",
            f"{here}%2fcanary{tail}",
            f"{here}/./canary{tail}",
            f"{here}/sub/../../canary{tail}",
            f"{here}/sub/canary{tail}",
            f"{here}{tail}",
            f"{here}/{tail}",
            f"{here}/..{tail}",
            f"{here}/.imagestore-{TOKEN}.part{tail}",
            f"{here}/disk.vmdk{tail}",
            f"{here}/canary",
            f"{here}/canary?",
            f"{here}/canary?dcPath=DC0",
            f"{here}/canary?dsName=LocalDS_0&dcPath=DC1",
            f"{here}/canary?dsName=LocalDS_2&dcPath=DC0",
            f"{here}/canary{tail}&dsName=LocalDS_2",
            f"{here}/canary{tail}&dcPath=DC1",
            f"{here}/canary{tail}&x=y",
            f"{here}/canary{tail}#x",
            f"https://{host}/folder/{directory}/canary{tail}",
        )

    @contextlib.contextmanager
    def canary(self) -> Iterator[None]:
        base = self.datastores.root()
        places = [path / "canary" for path in (base, base / "kit", self.datastores.root("DC1:LocalDS_0"))]
        for file in places:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"alive")
        yield
        for file in places:
            assert file.read_bytes() == b"alive"
            file.unlink()


class PlainHarness(VMwareHarness):
    server = "plain"


class TestPlain(DriverConformance):
    """The simulator as the vendor has it. It takes no name with two dots in a row; `TestStrict` has such ids."""

    harness = PlainHarness
    parts = TRANSFERS
    test_contract_odd_ids = None

    def test_two_dots_in_a_row(self) -> None:
        assert self._harness is not None
        with contextlib.closing(Store(self._harness.make_driver())) as store:
            with pytest.raises(StoreError) as caught:
                store.add("a..b", b"data")
            assert not caught.value.temporary
            assert not list(store.uploads())


class StrictHarness(VMwareHarness):
    @contextlib.contextmanager
    def failing(self) -> Iterator[Callable[[], int]]:
        with self.datastores.trouble(action="status", status=503, count=0):
            before = len(self.datastores.log())
            yield lambda: len(self.datastores.log()) - before

    @contextlib.contextmanager
    def hold(self, location: str) -> Iterator[None]:
        """What a server says of a file that is mounted."""
        with self.datastores.trouble(
            method="SOAP:DeleteDatastoreFile_Task", action="fault", fault="FileLocked", count=0
        ):
            yield


class TestStrict(DriverConformance):
    """Access to files needs a session."""

    harness = StrictHarness


class SeveralHarness(StrictHarness):
    """Two datastores of one weight, and one in another datacenter that has the name of the first."""

    stores = ("DC0:LocalDS_0:1", "DC0:LocalDS_1:1", "DC1:LocalDS_0")


class TestSeveralDatastores(DriverConformance):
    harness = SeveralHarness
    parts = TRANSFERS
