"""The Cinder that tests use, a driver for it, and an administrator's view of a project's volumes."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import _rbd
from _s3 import missing

from imagestore.driver import Options, Timeouts
from imagestore.drivers.cinder import CinderDriver

HERE = Path(__file__).parent


@functools.cache
def running() -> dict[str, str]:
    """What Cinder tells of itself; it is started when first asked for, with its Ceph, and stopped at the end.

    ``IMAGESTORE_CINDER_DIR`` names the directory of one that shall stay; its Ceph should stay too
    (``IMAGESTORE_RBD_DIR``).
    """
    cluster = _rbd.running()
    kept = os.environ.get("IMAGESTORE_CINDER_DIR")
    place = kept or tempfile.mkdtemp(prefix="imagestore-cinder-")
    command = [HERE / "cinder", "start", place, "--ceph", cluster["CEPH_DIR"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not kept:
        atexit.register(_stop, place)
    if done.returncode != 0:
        missing(f"cinder: no such server here: {done.stderr.strip()[-800:]}")
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _stop(place: str) -> None:
    subprocess.run([HERE / "cinder", "stop", place], capture_output=True, check=False)
    shutil.rmtree(place, ignore_errors=True)


def driver(url: str, *, timeouts: Timeouts | None = None, **values: Any) -> CinderDriver:
    told = {
        **{option.dest: option.default for option in CinderDriver.options},
        "endpoint_template": f"{url}/%(project_id)s",
        "connector": "minimal",
        "state_timeout": 60,
        **values,
    }
    return CinderDriver(Options(told), store="kit", timeouts=timeouts or Timeouts(connect=10, stall=60))


class Project:
    """One project's volumes, as an administrator sees them through the bare API."""

    def __init__(self, url: str, project: str) -> None:
        self.url = f"{url}/{project}"
        self.token = f"admin:{project}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {
            "X-Auth-Token": self.token,
            "Content-Type": "application/json",
            "OpenStack-API-Version": "volume 3.54",
        }
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def volumes(self) -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in self.ask("GET", "/volumes/detail")["volumes"]}

    def create(self, name: str, metadata: dict[str, str], kind: str) -> str:
        body = {"volume": {"size": 1, "name": name, "metadata": metadata, "volume_type": kind}}
        made: str = self.ask("POST", "/volumes", body)["volume"]["id"]
        self.wait(made, "available")
        return made

    def wait(self, volume_id: str, status: str) -> None:
        end = time.monotonic() + 60
        while (found := self.volumes()[volume_id]["status"]) != status:
            assert time.monotonic() < end, f"volume {volume_id} is {found}, not {status}"
            time.sleep(0.1)

    def delete(self, volume_id: str) -> None:
        self.ask("DELETE", f"/volumes/{volume_id}")
        end = time.monotonic() + 60
        while volume_id in self.volumes():
            assert time.monotonic() < end, f"volume {volume_id} does not go away"
            time.sleep(0.1)

    def reserve(self, volume_id: str) -> str:
        made: str = self.ask("POST", "/attachments", {"attachment": {"volume_uuid": volume_id}})["attachment"]["id"]
        return made

    def release(self, attachment_id: str) -> None:
        self.ask("DELETE", f"/attachments/{attachment_id}")
