"""What tests of Swift share: servers that are started once in a process, and ways in that are not the driver's."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from imagestore.driver import Options
from imagestore.drivers.swift import SwiftDriver

HERE = Path(__file__).parent
GLANCE = ("glance_store==5.7.0", "python-swiftclient>=4.6")


def missing(reason: str) -> None:
    """Skip by name, unless everything must run."""
    if os.environ.get("IMAGESTORE_REQUIRE_SERVERS") == "all":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def running(script: str, *settings: str) -> dict[str, str]:
    """What a server tells of itself; it is started when first asked for, and stopped at the end.

    ``IMAGESTORE_SWIFT_DIR`` and ``IMAGESTORE_CEPH_DIR`` name directories of servers that run already, and shall stay.
    """
    kept = os.environ.get(f"IMAGESTORE_{script.upper()}_DIR") if not settings else None
    place = Path(kept or tempfile.mkdtemp(prefix=f"imagestore-{script}-"))
    if not kept:
        done = subprocess.run([HERE / script, "start", place, *settings], capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(place, ignore_errors=True)
            missing(f"{script}: no such server here: {(done.stdout + done.stderr).strip()[-1500:]}")
        atexit.register(_stop, script, place)
    lines = (place / "env").read_text().splitlines()
    return {"PLACE": str(place), **dict(line.split("=", 1) for line in lines if "=" in line)}


def _stop(script: str, place: Path) -> None:
    subprocess.run([HERE / script, "stop", place], capture_output=True, check=False)
    shutil.rmtree(place, ignore_errors=True)


def control(server: dict[str, str], verb: str, *words: str) -> None:
    """``signal``, ``spawn`` or ``flush`` of the script."""
    subprocess.run([HERE / "swift", verb, server["PLACE"], *words], check=True, capture_output=True, timeout=60)


def options(**values: Any) -> Options:
    return Options({**{option.dest: option.default for option in SwiftDriver.options}, **values})


def session(server: dict[str, str], prefix: str = "OS") -> Any:
    """A session of one of the users."""
    from keystoneauth1 import session as sessions
    from keystoneauth1.identity import v3

    return sessions.Session(
        v3.Password(
            server["OS_AUTH_URL"],
            username=server[f"{prefix}_USERNAME"],
            password=server[f"{prefix}_PASSWORD"],
            project_name=server[f"{prefix}_PROJECT_NAME"],
            user_domain_id="default",
            project_domain_id="default",
        )
    )


def application_credential(server: dict[str, str]) -> dict[str, str]:
    own = session(server)
    answer = own.post(
        f"{server['OS_AUTH_URL']}/users/{own.get_user_id()}/application_credentials",
        json={"application_credential": {"name": uuid.uuid4().hex}},
    )
    made: dict[str, str] = answer.json()["application_credential"]
    own.session.close()
    return made


def context(server: dict[str, str], prefix: str, port: int) -> Any:
    """What a service knows of the user whose request it serves; the catalog names Swift at this port."""
    own = session(server, prefix)
    project = own.get_project_id()
    url = f"http://127.0.0.1:{port}/v1/AUTH_{project}"
    endpoint = {"region": server["OS_REGION_NAME"], "publicURL": url, "internalURL": "http://127.0.0.1:1/v1/x"}
    made = SimpleNamespace(
        auth_token=own.get_token(),
        user_id=own.get_user_id(),
        project_id=project,
        service_catalog=[
            {"type": "image", "name": "glance", "endpoints": [{"region": "RegionOne", "publicURL": "http://x"}]},
            {"type": "object-store", "name": "swift", "endpoints": [endpoint]},
        ],
    )
    own.session.close()
    return made


@functools.cache
def glance_python() -> str:
    """A Python that has glance_store and swiftclient; ``IMAGESTORE_GLANCE_PYTHON`` names one."""
    if given := os.environ.get("IMAGESTORE_GLANCE_PYTHON"):
        return given
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagestore-tests"
    cache.mkdir(parents=True, exist_ok=True)
    made = cache / "glance-store-5.7.0-swift"
    with (cache / "glance-store-swift.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "complete").exists():
            shutil.rmtree(made, ignore_errors=True)
            commands: Sequence[Sequence[Any]] = (
                [sys.executable, "-m", "venv", made],
                [made / "bin" / "pip", "install", "-q", *GLANCE],
            )
            for command in commands:
                done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
                if done.returncode:
                    missing(f"glance_store can't be installed: {done.stderr[-400:]}")
            (made / "complete").touch()
    return str(made / "bin" / "python")
