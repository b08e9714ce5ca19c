"""The Ceph clusters that the RBD tests use, the bindings of librbd, and an administrator's view of a cluster."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _s3 import missing

from imagestore.driver import Options, Timeouts
from imagestore.drivers.rbd import RbdDriver

HERE = Path(__file__).parent
DEBIAN_MODULES = Path("/usr/lib/python3/dist-packages")
# What librbd keeps in a pool for good.
STANDING = {"rbd_directory", "rbd_info", "rbd_trash", "rbd_children", "rbd_namespace", "rbd_trash_purge_schedule"}


@functools.cache
def running(*options: str) -> dict[str, str]:
    """What a cluster tells of itself; it is started when first asked for, and stopped at the end.

    ``IMAGESTORE_RBD_DIR`` names the directory of one without options that shall stay.
    """
    kept = os.environ.get("IMAGESTORE_RBD_DIR") if not options else None
    place = kept or tempfile.mkdtemp(prefix="imagestore-rbd-")
    done = subprocess.run(
        [HERE / "ceph", "start", place, "--rgw", "no", *options], capture_output=True, text=True, check=False
    )
    if not kept:
        atexit.register(_stop, place)
    if done.returncode != 0:
        missing(f"ceph: no such server here: {done.stderr.strip()[-800:]}")
    bindings()
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _stop(place: str) -> None:
    subprocess.run([HERE / "ceph", "stop", place], capture_output=True, check=False)
    shutil.rmtree(place, ignore_errors=True)


@functools.cache
def bindings() -> str:
    """Let this process, and those that it starts, see the system's rados and rbd, and nothing else of the system's.

    Returns the directory that has them.
    """
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    place = tempfile.mkdtemp(prefix="imagestore-rbd-modules-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for name in ("rados", "rbd"):
        file = DEBIAN_MODULES / f"{name}{suffix}"
        if not file.exists():
            missing(f"rbd: there is no {file}: this Python is another version than the system's")
        (Path(place) / file.name).symlink_to(file)
    sys.path.insert(0, place)
    return place


def options(**values: Any) -> Options:
    return Options({**{option.dest: option.default for option in RbdDriver.options}, **values})


class Admin:
    """A cluster as ``client.admin`` sees it."""

    def __init__(self, env: dict[str, str]) -> None:
        import rados
        import rbd

        self.env = env
        self.sdk, self.errors = rbd, rados
        self.rbd = rbd.RBD()
        waits = {"client_mount_timeout": "30", "rados_mon_op_timeout": "60", "rados_osd_op_timeout": "60"}
        self.cluster = rados.Rados(conffile=env["CEPH_CONF"], name="client.admin", conf=waits)
        self.cluster.connect()
        self.fsid: str = self.cluster.get_fsid()

    def close(self) -> None:
        self.cluster.shutdown()

    def command(self, prefix: str, **arguments: Any) -> bytes:
        code, answer, text = self.cluster.mon_command(json.dumps({"prefix": prefix, **arguments}), b"")
        assert code == 0, f"{prefix} {arguments}: {code} {text}"
        return bytes(answer)

    def daemon(self, verb: str, name: str) -> None:
        """``kill``, ``run``, ``freeze`` or ``thaw`` a daemon."""
        subprocess.run([HERE / "ceph", verb, self.env["CEPH_DIR"], name], check=True, capture_output=True, timeout=90)

    def make_pool(self) -> str:
        name = f"kit-{uuid.uuid4().hex[:8]}"
        self.command("osd pool create", pool=name, pg_num=4)
        with self.pool(name) as ioctx:
            self.rbd.pool_init(ioctx, False)
        return name

    def delete_pool(self, name: str) -> None:
        self.command("osd pool delete", pool=name, pool2=name, yes_i_really_really_mean_it=True)

    @contextlib.contextmanager
    def pool(self, name: str, namespace: str = "") -> Iterator[Any]:
        ioctx = self.cluster.open_ioctx(name)
        ioctx.set_namespace(namespace)
        try:
            yield ioctx
        finally:
            ioctx.close()

    def objects(self, pool: str, namespace: str = "") -> set[str]:
        """Names of all objects that are there for an image."""
        with self.pool(pool, namespace) as ioctx:
            return {item.key for item in ioctx.list_objects()} - STANDING

    def image(self, pool: str, name: str, data: bytes = b"", *, snapshot: str = "", namespace: str = "") -> None:
        """Make an image as other tools do."""
        with self.pool(pool, namespace) as ioctx:
            self.rbd.create(ioctx, name, len(data), old_format=False)
            with self.sdk.Image(ioctx, name) as image:
                if data:
                    image.write(data, 0)
                if snapshot:
                    image.create_snap(snapshot)
                    image.protect_snap(snapshot)

    def remove(self, pool: str, name: str, namespace: str = "") -> None:
        """Remove an image with its snapshots, and wait for watches of the dead."""
        with self.pool(pool, namespace) as ioctx:
            with self.sdk.Image(ioctx, name) as image:
                for snapshot in list(image.list_snaps()):
                    if image.is_protected_snap(snapshot["name"]):
                        image.unprotect_snap(snapshot["name"])
                    image.remove_snap(snapshot["name"])
            end = time.monotonic() + 20
            while True:
                try:
                    return self.rbd.remove(ioctx, name)
                except self.sdk.ImageBusy:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.2)

    def contents(self, pool: str, name: str, namespace: str = "", snapshot: str | None = None) -> bytes:
        with self.pool(pool, namespace) as ioctx, self.sdk.Image(ioctx, name, snapshot, read_only=True) as image:
            return bytes(image.read(0, image.size())) if image.size() else b""

    def clone(self, pool: str, name: str, to: tuple[str, str]) -> None:
        with self.pool(pool) as ioctx, self.pool(to[0]) as other:
            self.rbd.clone(ioctx, name, "snap", other, to[1])


def driver(env: dict[str, str], *, timeouts: Timeouts | None = None, **values: Any) -> RbdDriver:
    told = {"ceph_conf": env["CEPH_CONF"], "user": env["CEPH_USER"], "pool": env["CEPH_POOL"], **values}
    return RbdDriver(options(**told), store="rbd", timeouts=timeouts or Timeouts(connect=10, stall=30))
