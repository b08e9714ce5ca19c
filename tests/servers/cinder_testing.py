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
import warnings
from pathlib import Path
from typing import Any

import _rbd
from _s3 import missing

from imagestore.driver import Options, Timeouts
from imagestore.drivers.cinder import CinderDriver

HERE = Path(__file__).parent


@functools.cache
def running(*options: str) -> dict[str, str]:
    """What Cinder tells of itself; it is started when first asked for, with its Ceph, and stopped at the end.

    ``IMAGESTORE_CINDER_DIR`` names the directory of one without options that shall stay; its Ceph should stay too
    (``IMAGESTORE_RBD_DIR``).
    """
    cluster = _rbd.running()
    kept = os.environ.get("IMAGESTORE_CINDER_DIR") if not options else None
    place = kept or tempfile.mkdtemp(prefix="imagestore-cinder-")
    if not kept:
        atexit.register(_stop, place)
    return started("--ceph", cluster["CEPH_DIR"], *options, place=place)


def started(*options: str, place: str) -> dict[str, str]:
    """Start one in a directory, or start it again."""
    _rbd.bindings()
    import_quietly()
    done = subprocess.run([HERE / "cinder", "start", place, *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        missing(f"cinder: no such server here: {done.stderr.strip()[-800:]}")
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def import_quietly() -> None:
    """Import os-brick now, which brings a library that warns of its own age. After librbd, which it looks for then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import os_brick.initiator.connector  # noqa: F401 - for what it does


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
        self.server, self.id = url, project
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

    def names(self) -> list[str]:
        return [f"{each['name']} {each['status']}" for each in self.volumes().values()]

    def reset(self, volume_id: str, status: str) -> None:
        self.ask("POST", f"/volumes/{volume_id}/action", {"os-reset_status": {"status": status}})

    def force(self, volume_id: str) -> None:
        """Delete a volume although it is attached."""
        for each in self.ask("GET", f"/attachments?volume_id={volume_id}")["attachments"]:
            self.release(each["id"])
        self.ask("POST", f"/volumes/{volume_id}/action", {"os-force_delete": {}})

    def set_quota(self, **values: int) -> None:
        self.ask("PUT", f"/os-quota-sets/{self.id}", {"quota_set": values})

    def make_type(self, name: str, *, encrypted: bool = False, **specs: str) -> None:
        """A volume type, if it is not there yet."""
        if name in {each["name"] for each in self.ask("GET", "/types")["volume_types"]}:
            return
        made = self.ask("POST", "/types", {"volume_type": {"name": name}})["volume_type"]["id"]
        self.ask("POST", f"/types/{made}/extra_specs", {"extra_specs": specs})
        if encrypted:
            how = {"provider": "luks", "cipher": "aes-xts-plain64", "key_size": 256, "control_location": "front-end"}
            self.ask("POST", f"/types/{made}/encryption", {"encryption": how})

    def snapshot(self, volume_id: str) -> str:
        made: str = self.ask("POST", "/snapshots", {"snapshot": {"volume_id": volume_id}})["snapshot"]["id"]
        return made

    def delete_snapshot(self, snapshot_id: str) -> None:
        end = time.monotonic() + 60
        deleted = False
        while there := [each for each in self.ask("GET", "/snapshots")["snapshots"] if each["id"] == snapshot_id]:
            assert time.monotonic() < end, f"snapshot {snapshot_id} is {there[0]['status']}"
            if there[0]["status"] == "available" and not deleted:
                self.ask("DELETE", f"/snapshots/{snapshot_id}")
                deleted = True
            time.sleep(0.1)
