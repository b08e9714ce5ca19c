"""The S3 servers that tests use: started once in a process, and clients for looking behind the driver's back."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

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
        reason = f"{name}: no such server here: {done.stderr.strip()[-800:]}"
        if os.environ.get("IMAGESTORE_REQUIRE_SERVERS") == "all":
            pytest.fail(reason)
        pytest.skip(reason)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _stop(name: str, place: str) -> None:
    subprocess.run([HERE / name, "stop", place], capture_output=True, check=False)
    shutil.rmtree(place, ignore_errors=True)


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
