"""What tests of VMware datastores share: servers that are started once, their controls, and ways past the driver."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import json
import os
import shutil
import ssl
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from imagestore.driver import Options, Timeouts
from imagestore.drivers.vmware import VMwareDriver

SCRIPT = Path(__file__).parent / "vmware"


@functools.cache
def running(mine: str = "") -> dict[str, str]:
    """What the servers tell of themselves; they are started when first asked for, and stopped at the end.

    ``IMAGESTORE_VMWARE_DIR`` names a directory of servers that shall stay. Whoever kills servers has some of his own.
    """
    kept = os.environ.get("IMAGESTORE_VMWARE_DIR") if not mine else None
    place = kept or tempfile.mkdtemp(prefix="imagestore-vmware-")
    done = subprocess.run([SCRIPT, "start", place], capture_output=True, text=True, check=False, timeout=1500)
    if not kept:
        atexit.register(_stop, place)
    if done.returncode != 0:
        reason = f"vmware: no such servers here: {done.stderr.strip()[-800:]}"
        if os.environ.get("IMAGESTORE_REQUIRE_SERVERS") == "all":
            pytest.fail(reason)
        pytest.skip(reason)
    return {"PLACE": place, **dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)}


def _stop(place: str) -> None:
    subprocess.run([SCRIPT, "stop", place], capture_output=True, check=False)
    shutil.rmtree(place, ignore_errors=True)


def script(env: dict[str, str], verb: str, name: str) -> None:
    """``kill`` or ``spawn``."""
    subprocess.run([SCRIPT, verb, env["PLACE"], name], check=True, capture_output=True, timeout=60)


def options(**values: Any) -> Options:
    return Options({**{option.dest: option.default for option in VMwareDriver.options}, **values})


class Datastores:
    """A directory of its own in some datastores of one of the servers, and ways to it past the driver."""

    def __init__(self, server: str, stores: tuple[str, ...] = ("DC0:LocalDS_0",), mine: str = "") -> None:
        self.env = running(mine)
        self.server = server
        self.address = self.env[f"VC_{server.upper()}"]
        self.directory = f"kit/{uuid.uuid4().hex[:12]}"
        self.stores = stores

    def values(self, **changes: Any) -> dict[str, Any]:
        return {
            "host": self.address,
            "user": self.env["VC_USER"],
            "password": self.env["VC_PASSWORD"],
            "cacert": self.env["VC_CACERT"],
            "datastores": list(self.stores),
            "image_dir": self.directory,
            **changes,
        }

    def driver(self, *, timeouts: Timeouts | None = None, **changes: Any) -> VMwareDriver:
        return VMwareDriver(
            options(**self.values(**changes)), store="kit", timeouts=timeouts or Timeouts(connect=10, stall=30)
        )

    def root(self, store: str = "") -> Path:
        """Where the server has the files of a datastore."""
        datacenter, name, *_ = (store or self.stores[0]).split(":")
        return Path(self.env["PLACE"], self.server, "files", datacenter, name)

    def path(self, store: str = "") -> Path:
        return self.root(store) / self.directory

    def files(self) -> set[str]:
        """All files in the directory, in all datastores."""
        return {
            str(path.relative_to(self.path(store)))
            for store in self.stores
            for path in self.path(store).rglob("*")
            if path.is_file()
        }

    def remove(self) -> None:
        for store in self.stores:
            shutil.rmtree(self.path(store), ignore_errors=True)

    # What the strict server does when told

    def control(self, verb: str, body: object = None, **query: object) -> str:
        context = ssl.create_default_context(cafile=self.env["VC_CACERT"])
        wire = http.client.HTTPSConnection(self.address, context=context, timeout=30)
        with contextlib.closing(wire):
            wire.request("POST", f"/_ctl/{verb}?{urlencode(query)}", json.dumps(body) if body else None)
            answer = wire.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            return text

    def leave_room(self, store: str, free: int) -> None:
        """From now on the datastore has room for so many bytes and no more."""
        used = sum(path.stat().st_size for path in self.root(store).rglob("*") if path.is_file())
        self.control("datastore", key=store.replace(":", "/"), room=used + free)

    @contextlib.contextmanager
    def trouble(self, **rule: object) -> Iterator[None]:
        """A rule of the strict server (see gate.go) while the context lasts; everything is as before at its end."""
        self.control("fault", {"method": "*", "count": 1, **rule})
        try:
            yield
        finally:
            self.control("reset")

    def log(self) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = json.loads(self.control("log"))
        return told
