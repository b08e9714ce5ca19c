"""Images that others stored in a real S3 server, and others' tools on images that imagestore stored.

``IMAGESTORE_GLANCE_PYTHON`` names a Python that has glance_store 5.7.0 and boto3; without it an environment is made
with pip, as for Amazon's command line. rclone is the system's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("boto3", reason="the S3 driver needs boto3")

sys.path.insert(0, str(Path(__file__).parents[1] / "servers"))

from _glance import glance_store
from _s3 import client, missing, programs, running

from imagestore import NotFound, Store, load_stores

GLANCE = ("glance_store==5.7.0", "boto3>=1.36")
AWSCLI = "awscli>=1.40"
MIB = 1024 * 1024
IMAGES = {"small": 300_000, "parts": 12 * MIB + 17, "unknown": 11 * MIB + 3}


def glance(conf: Path, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    python = os.environ.get("IMAGESTORE_GLANCE_PYTHON") or programs("glance-store-5.7.0-s3", *GLANCE) / "python"
    return glance_store(python, conf, *jobs)


class Place:
    """A bucket, a glance-api.conf for it, and our store from the same file."""

    def __init__(self, directory: Path) -> None:
        self.env = running("ceph")
        self.bucket = f"interop-{uuid.uuid4().hex[:12]}"
        self.s3 = client(self.env)
        self.s3.create_bucket(Bucket=self.bucket)
        self.directory = directory
        self.conf = directory / "glance-api.conf"
        self.conf.write_text(
            "[DEFAULT]\nenabled_backends = old:s3\n[glance_store]\ndefault_backend = old\n[old]\n"
            f"s3_store_host = {self.env['S3_ENDPOINT']}\ns3_store_region_name = {self.env['S3_REGION']}\n"
            f"s3_store_access_key = {self.env['S3_ACCESS_KEY']}\ns3_store_secret_key = {self.env['S3_SECRET_KEY']}\n"
            f"s3_store_bucket = {self.bucket}\ns3_store_bucket_url_format = path\n"
            "s3_store_large_object_size = 5\ns3_store_large_object_chunk_size = 5\n"
        )
        self.paths = {name: directory / name for name in IMAGES}
        for name, path in self.paths.items():
            path.write_bytes(random.Random(name).randbytes(IMAGES[name]))
        self.stores = load_stores(str(self.conf))
        self.store: Store = self.stores["old"]

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.paths[name].read_bytes()).hexdigest()

    def close(self) -> None:
        self.stores.close()
        for item in self.s3.list_objects_v2(Bucket=self.bucket).get("Contents", ()):
            self.s3.delete_object(Bucket=self.bucket, Key=item["Key"])
        self.s3.delete_bucket(Bucket=self.bucket)
        self.s3.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with contextlib.closing(Place(tmp_path_factory.mktemp("interop"))) as made:
        yield made


def test_what_glance_stored(place: Place) -> None:
    ids = {name: str(uuid.uuid4()) for name in IMAGES}
    told = glance(
        place.conf,
        *(
            {
                "verb": "add",
                "id": ids[name],
                "path": str(path),
                "size": 0 if name == "unknown" else path.stat().st_size,
            }
            for name, path in place.paths.items()
        ),
    )
    for name, stored in zip(IMAGES, told, strict=True):
        assert stored["sha256"] == place.sha256(name)
        assert place.store.get_size(stored["uri"]) == IMAGES[name]
        with place.store.get(stored["uri"], expected={"sha256": stored["sha256"]}) as reader:
            assert b"".join(reader) == place.paths[name].read_bytes()
        assert place.store.locate(ids[name]).uri == stored["uri"], "the same image has another location"
        # As older releases wrote them, with the credentials inside; the secret had slashes.
        scheme, _, rest = stored["uri"].partition("://")
        assert place.store.get_size(f"{scheme}://OLDKEY:old/se@cret@{rest}") == IMAGES[name]
        place.store.delete(stored["uri"])
        with pytest.raises(NotFound):
            place.store.get_size(stored["uri"])


def test_glance_reads_ours(place: Place) -> None:
    results = {name: place.store.add(str(uuid.uuid4()), path) for name, path in place.paths.items()}
    told = glance(place.conf, *({"verb": "get", "uri": result.location.uri} for result in results.values()))
    for name, read in zip(IMAGES, told, strict=True):
        assert read == {"count": IMAGES[name], "size": IMAGES[name], "sha256": place.sha256(name)}
    glance(place.conf, *({"verb": "delete", "uri": result.location.uri} for result in results.values()))
    for result in results.values():
        assert not place.store.exists(result.image_id)


@pytest.mark.parametrize("tool", ["aws", "rclone"])
def test_tools_read_ours(place: Place, tool: str, tmp_path: Path) -> None:
    program = str(programs("awscli", AWSCLI) / "aws") if tool == "aws" else shutil.which(tool)
    if program is None:
        missing(f"{tool} is not installed")
    # What is set for the network of the machine does not belong here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))} | {
        "AWS_ACCESS_KEY_ID": place.env["S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": place.env["S3_SECRET_KEY"],
        "AWS_DEFAULT_REGION": place.env["S3_REGION"],
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "RCLONE_CONFIG": str(tmp_path / "none"),
        "RCLONE_CONFIG_REMOTE_TYPE": "s3",
        "RCLONE_CONFIG_REMOTE_PROVIDER": "Ceph",
        "RCLONE_CONFIG_REMOTE_ENV_AUTH": "true",
        "RCLONE_CONFIG_REMOTE_ENDPOINT": place.env["S3_ENDPOINT"],
    }
    for name, path in place.paths.items():
        image_id = place.store.add(str(uuid.uuid4()), path).image_id
        got = tmp_path / name
        command = (
            [program, "--endpoint-url", place.env["S3_ENDPOINT"], "s3", "cp", f"s3://{place.bucket}/{image_id}", got]
            if tool == "aws"
            else [program, "copyto", f"remote:{place.bucket}/{image_id}", got]
        )
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert got.read_bytes() == path.read_bytes()
        place.store.delete(place.store.locate(image_id))
