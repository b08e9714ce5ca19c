"""The MongoDB server that tests use: started once in a process, and ways to look behind the driver's back."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pymongo import monitoring

from imagestore.driver import Options
from imagestore.drivers.gridfs import GridFSDriver

HERE = Path(__file__).parent
UNFINISHED = re.compile(r"\.imagestore-[0-9a-f]{32}")


@functools.cache
def running() -> dict[str, str]:
    """What the server tells of itself; it is started when first asked for, and stopped at the end.

    ``IMAGESTORE_MONGODB_DIR`` names the directory of one that shall stay.
    """
    kept = os.environ.get("IMAGESTORE_MONGODB_DIR")
    place = kept or tempfile.mkdtemp(prefix="imagestore-mongodb-")
    done = subprocess.run([HERE / "mongodb", "start", place], capture_output=True, text=True, check=False)
    if not kept:
        atexit.register(_stop, place)
    if done.returncode != 0:
        reason = f"no MongoDB here: {done.stderr.strip()[-800:]}"
        if os.environ.get("IMAGESTORE_REQUIRE_SERVERS") == "all":
            pytest.fail(reason)
        pytest.skip(reason)
    return {"PLACE": place} | dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _stop(place: str) -> None:
    subprocess.run([HERE / "mongodb", "stop", place], capture_output=True, check=False)
    shutil.rmtree(place, ignore_errors=True)


def server(verb: str) -> None:
    """``kill`` it with all its processes, or ``run`` it again."""
    subprocess.run([HERE / "mongodb", verb, running()["PLACE"]], check=True, capture_output=True, timeout=120)


def options(**values: Any) -> Options:
    return Options({**{option.dest: option.default for option in GridFSDriver.options}, **values})


def client(url: str) -> Any:
    return pymongo.MongoClient(url, serverSelectionTimeoutMS=20000, tz_aware=True)


@contextlib.contextmanager
def failing(url: str, commands: tuple[str, ...], mode: Any = "alwaysOn", **data: Any) -> Iterator[None]:
    """Meanwhile these commands fail, with an ``errorCode`` or ``closeConnection``."""
    with client(url) as admin:
        point = {"configureFailPoint": "failCommand", "data": {"failCommands": list(commands), **data}}
        admin.admin.command({**point, "mode": mode})
        try:
            yield
        finally:
            admin.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


class Requests(monitoring.CommandListener):
    """Counts the commands of all clients of this process, and keeps them while somebody wants them."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.kept: list[Any] | None = None

    @contextlib.contextmanager
    def keeping(self) -> Iterator[list[Any]]:
        self.kept = kept = []
        try:
            yield kept
        finally:
            self.kept = None

    def started(self, event: Any) -> None:
        self.count[event.command_name] += 1
        if self.kept is not None:
            self.kept.append(event.command)

    def succeeded(self, event: Any) -> None: ...

    def failed(self, event: Any) -> None: ...


REQUESTS = Requests()
monitoring.register(REQUESTS)


def remains(database: Any, bucket: str = "fs") -> dict[str, list[Any]]:
    """What is in a bucket that no image needs: chunks without a file, files without an image id, marks."""
    files = list(database[f"{bucket}.files"].find())
    there = [file["_id"] for file in files]
    orphans = [{"$match": {"files_id": {"$nin": there}}}, {"$group": {"_id": "$files_id"}}]
    return {
        "chunks": [group["_id"] for group in database[f"{bucket}.chunks"].aggregate(orphans)],
        "files": [file["_id"] for file in files if UNFINISHED.fullmatch(str(file.get("filename")))],
        "uploads": list(database[f"{bucket}.uploads"].find()),
    }
