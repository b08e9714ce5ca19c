"""The S3 servers and tools that tests use: servers are started once in a process, tools are installed once for all."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from imagestore.driver import Options
from imagestore.drivers.s3 import S3Driver

HERE = Path(__file__).parent


@functools.cache
def running(name: str) -> dict[str, str]:
    """What a server tells of itself; it is started when first asked for, and stopped at the end.

    ``IMAGESTORE_CEPH_DIR`` and ``IMAGESTORE_MOTO_DIR`` name directories of servers that shall stay.
    """
    kept = os.environ.get(f"IMAGESTORE_{name.upper()}_DIR")
    place = kept or tempfile.mkdtemp(prefix=f"imagestore-{name}-")
    done = subprocess.run([HERE / name, "start", place], capture_output=True, text=True, check=False)
    if not kept:
        atexit.register(_stop, name, place)
    if done.returncode != 0:
        missing(f"{name}: no such server here: {done.stderr.strip()[-800:]}")
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _stop(name: str, place: str) -> None:
    subprocess.run([HERE / name, "stop", place], capture_output=True, check=False)
    shutil.rmtree(place, ignore_errors=True)


def missing(reason: str) -> NoReturn:
    """Skip by name, unless everything must run."""
    if os.environ.get("IMAGESTORE_REQUIRE_SERVERS") == "all":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def programs(name: str, *requirements: str) -> Path:
    """The programs of an environment with these packages, in ``$IMAGESTORE_TEST_CACHE`` or the user's cache."""
    cache = Path(os.environ.get("IMAGESTORE_TEST_CACHE") or Path.home() / ".cache" / "imagestore-tests")
    cache.mkdir(parents=True, exist_ok=True)
    made = cache / name
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "complete").exists():
            shutil.rmtree(made, ignore_errors=True)
            for command in (
                [sys.executable, "-m", "venv", made],
                [made / "bin" / "pip", "install", "-q", "--disable-pip-version-check", *requirements],
            ):
                done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
                if done.returncode:
                    missing(f"{name} can't be installed: {done.stderr[-400:]}")
            (made / "complete").touch()
    return made / "bin"


def options(**values: Any) -> Options:
    return Options({**{option.dest: option.default for option in S3Driver.options}, **values})


def client(env: dict[str, str], endpoint: str = "") -> Any:
    """An SDK client of our own, for looking behind the driver's back."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint or env["S3_ENDPOINT"],
        region_name=env["S3_REGION"],
        aws_access_key_id=env["S3_ACCESS_KEY"],
        aws_secret_access_key=env["S3_SECRET_KEY"],
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
