"""The kit on the filesystem driver: file systems, staging, several directories."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from imagestore.driver import Driver, Options
from imagestore.drivers.filesystem import FilesystemDriver
from imagestore.testing import DriverConformance, Harness

pytestmark = pytest.mark.filterwarnings("error")


class FilesystemHarness(Harness):
    """Images below a temporary directory in ``parent``; a canary lies beside the data directories."""

    processes = True
    vanishing = True
    sdk = ("boto3", "swiftclient", "cinderclient", "pymongo", "requests")
    parent: ClassVar[str | None] = None
    settings: ClassVar[dict[str, Any]] = {}
    directories: ClassVar[tuple[str, ...]] = ("images",)

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="imagestore-kit-", dir=self.parent))
        self.paths = [self.root / name for name in self.directories]

    def make_driver(self) -> Driver:
        values = {option.dest: option.default for option in FilesystemDriver.options}
        if len(self.paths) == 1:
            values["datadir"] = str(self.paths[0])
        else:
            values["datadirs"] = [f"{path}:{number}" for number, path in enumerate(self.paths)]
        return FilesystemDriver(Options({**values, "fsync": False, **self.settings}), store="kit")

    def make_unreachable(self) -> None:
        """A missing directory is a mistake in the configuration, and a hung mount can't be timed out."""

    def close(self) -> None:
        shutil.rmtree(self.root)

    def plant_foreign(self) -> Callable[[], None]:
        planted: dict[Path, bytes | str | None] = {}
        for path in self.paths:
            names = (".hidden", ".imagestore", ".imagestore-", ".imagestore-xyz.part", ".part", ".nfs0001", "found~")
            for name in (*names, ".imagestore-0123456789abcdef0123456789abcdef.part.bak", "a b", "#backup#", "x.y"):
                planted[path / name] = name.encode()
            planted[path / "sub" / "image"] = b"below"
            planted[path / ".sub" / ".imagestore-0123456789abcdef0123456789abcdef.part"] = b"below"
            for file, data in planted.items():
                if isinstance(data, bytes):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(data)
            links = {path / "link": "sub/image", path / ".imagestore-ffffffffffffffffffffffffffffffff.part": "link"}
            for link, target in links.items():
                if not link.is_symlink():
                    link.symlink_to(target)
            planted.update(links)
            (path / "empty").mkdir(exist_ok=True)
            planted[path / "empty"] = None

        def untouched() -> None:
            for file, data in planted.items():
                if data is None:
                    assert file.is_dir(), file
                elif isinstance(data, str):
                    assert os.readlink(file) == data
                else:
                    assert file.read_bytes() == data

        return untouched

    def hostile_locations(self) -> Iterable[str]:
        image = self.paths[0]
        (image / "out").unlink(missing_ok=True)
        (image / "out").symlink_to(self.root)
        (image / "secret").unlink(missing_ok=True)
        (image / "secret").symlink_to(self.root / "canary")
        return (
            "file:///etc/passwd",
            "filesystem:///etc/passwd",
            f"file://{self.root}/canary",
            f"file://{image}/../canary",
            f"file://{image}/./../canary",
            f"file://{image}//../canary",
            f"file://{image}/sub/../../canary",
            f"file://{image}x/../canary",
            f"file://{image}",
            f"file://{image}/",
            f"file://{image}/.",
            f"file://{image}/..",
            f"file://{image}/\0",
            f"file://{image}/a\0/../../canary",
            f"file://{image}/out/canary",
            f"file://{image}/secret",
            f"file://{image}/.imagestore-lock",
            f"file://host{image}/image",
            f"file:{image}/image",
            f"http://{image}/image",
        )

    @contextlib.contextmanager
    def canary(self) -> Iterator[None]:
        file = self.root / "canary"
        file.write_bytes(b"alive")
        yield
        assert file.read_bytes() == b"alive"
        for name in ("out", "secret"):
            (self.paths[0] / name).unlink(missing_ok=True)


def _is_on(kind: str, path: str) -> bool:
    done = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True)
    return done.stdout.strip() == kind


def _unavailable(reason: str) -> None:
    """Skip, unless the caller wants everything to run."""
    if os.environ.get("IMAGESTORE_REQUIRE_SERVERS") == "all":
        pytest.fail(reason)
    pytest.skip(reason)


class TestFilesystem(DriverConformance):
    """Where temporary files are: ext4 on most machines."""

    harness = FilesystemHarness


class SyncedHarness(FilesystemHarness):
    settings: ClassVar[dict[str, Any]] = {"fsync": True}


class TestSynced(DriverConformance):
    harness = SyncedHarness


class NamedHarness(FilesystemHarness):
    vanishing = False
    settings: ClassVar[dict[str, Any]] = {"staging": "named"}


class TestNamedParts(DriverConformance):
    harness = NamedHarness


class FullHarness(FilesystemHarness):
    settings: ClassVar[dict[str, Any]] = {"sparse": False}


class TestNotSparse(DriverConformance):
    harness = FullHarness


class SeveralHarness(FilesystemHarness):
    directories = ("first", "second", "third")


class TestSeveralDirectories(DriverConformance):
    harness = SeveralHarness


class TmpfsHarness(FilesystemHarness):
    parent = "/dev/shm"


class TestTmpfs(DriverConformance):
    harness = TmpfsHarness

    @classmethod
    def make_harness(cls) -> Harness:
        if not os.path.isdir("/dev/shm") or not _is_on("tmpfs", "/dev/shm"):
            _unavailable("tmpfs: there is none at /dev/shm")
        return TmpfsHarness()


class LoopHarness(FilesystemHarness):
    """A file system of its own in a file on a loop device."""

    make: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        with contextlib.ExitStack() as exits:
            self.place = Path(tempfile.mkdtemp(prefix="imagestore-loop-"))
            exits.callback(shutil.rmtree, self.place)
            kind = self.make[0].removeprefix("mkfs.")
            if os.geteuid() != 0:
                _unavailable(f"{kind}: only root can mount a loop device")
            if shutil.which(self.make[0]) is None:
                _unavailable(f"{kind}: {self.make[0]} is not installed")
            device, mount = self.place / "device", self.place / "mount"
            mount.mkdir()
            with device.open("wb") as file:
                file.truncate(512 << 20)
            for command in ([*self.make, str(device)], ["mount", "-o", "loop", str(device), str(mount)]):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    _unavailable(f"{kind}: {' '.join(command)} failed: {done.stderr.strip()}")
            exits.callback(subprocess.run, ["umount", str(mount)], check=True)
            type(self).parent = str(mount)
            super().__init__()
            exits.pop_all()

    def close(self) -> None:
        super().close()
        subprocess.run(["umount", str(self.place / "mount")], check=True)
        shutil.rmtree(self.place)


class XfsHarness(LoopHarness):
    make = ("mkfs.xfs", "-q")


class TestXfs(DriverConformance):
    harness = XfsHarness


class BtrfsHarness(LoopHarness):
    make = ("mkfs.btrfs", "-q")


class TestBtrfs(DriverConformance):
    harness = BtrfsHarness
