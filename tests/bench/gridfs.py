"""GridFS beside pymongo's own: ``python tests/bench/gridfs.py [--size MIB] [--runs N] [--job NAME]``.

Starts a server of its own (``IMAGESTORE_MONGODB_DIR`` names one that runs already) and prints, for every job and
tool, the median of wall seconds, the client's CPU seconds (user and system) and its peak RSS in MiB above an idle one.
The jobs are an image of known size, a download, and 1 MiB out of the middle of an image; for that one pymongo is asked
to seek and read, and for ``download_to_stream`` of the whole, which is what a store without ranged reads has to do. The
tools take turns, so that what changes on the machine meets all; compare rows of one run only: client and server share
the machine.

imagestore computes sha256, pymongo no digest. ``--no-digest`` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVER = HERE.parent / "servers" / "mongodb"
MIB = 1024 * 1024

OURS = """
from imagestore import open_store
from imagestore._models import Limits
store = open_store("gridfs", uri=env["MONGODB_URL"], database=env["DATABASE"], limits=LIMITS)
store.exists("x")
digests = ("sha256",) if env["DIGEST"] else ()

def work():
    if job == "add":
        store.add("ours", path, digests=digests)
    elif job == "get":
        with store.get("gridfs://get") as reader, open(path + ".got", "wb") as out:
            for chunk in reader:
                out.write(chunk)
    else:
        with store.get("gridfs://get", start=middle, stop=middle + (1 << 20)) as reader:
            assert len(reader.read()) == 1 << 20
"""

THEIRS = """
import gridfs, pymongo
client = pymongo.MongoClient(env["MONGODB_URL"], w="majority")
bucket = gridfs.GridFSBucket(client[env["DATABASE"]])
bucket.find({}).to_list()

def work():
    if job == "add":
        with open(path, "rb") as file:
            bucket.upload_from_stream("theirs", file)
    elif job == "get" or tool == "whole":
        with open(path + ".got", "wb") as out:
            bucket.download_to_stream_by_name("get", out)
    else:
        file = bucket.open_download_stream_by_name("get")
        file.seek(middle)
        assert len(file.read(1 << 20)) == 1 << 20
"""

HEAD = """
import json, os, sys
env, job, tool, path = json.loads(sys.argv[1]), *sys.argv[2:]
middle = os.path.getsize(path) // 2 + 12345
"""

MEASURE = """
import resource, time
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
def told(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024
base, before, began = told("VmRSS"), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
work()
wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps([wall, cpu, told("VmHWM") - base]))
"""

JOBS = {"add": ("imagestore", "pymongo"), "get": ("imagestore", "pymongo"), "range": ("imagestore", "seek", "whole")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="of the image, in MiB")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--job", action="append", choices=list(JOBS))
    parser.add_argument("--no-digest", action="store_true")
    parser.add_argument("--memory", type=int, default=64, help="limit for imagestore, in MiB")
    told = parser.parse_args()
    # So that no server stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    directory = Path(tempfile.mkdtemp(prefix="imagestore-bench-"))
    kept = os.environ.get("IMAGESTORE_MONGODB_DIR")
    place = kept or str(directory / "mongodb")
    try:
        done = subprocess.run([SERVER, "start", place], capture_output=True, text=True, check=True)
        env = dict(line.split("=", 1) for line in done.stdout.splitlines())
        bench(told, directory, env)
    finally:
        if not kept:
            subprocess.run([SERVER, "stop", place], check=False)
        shutil.rmtree(directory)


def bench(told: argparse.Namespace, directory: Path, env: dict[str, str]) -> None:
    import pymongo

    env["DATABASE"] = f"bench_{random.randrange(1 << 32):08x}"
    env["DIGEST"] = "" if told.no_digest else "yes"
    path = directory / "image"
    with path.open("wb") as file:
        for _ in range(told.size):
            file.write(random.randbytes(MIB))
    figures: dict[tuple[str, str], list[list[float]]] = {}
    jobs = told.job or list(JOBS)
    client: pymongo.MongoClient[dict[str, object]] = pymongo.MongoClient(env["MONGODB_URL"])
    database = client[env["DATABASE"]]
    try:
        for job in jobs:
            for _ in range(told.runs):
                for tool in JOBS[job]:
                    if job != "add" and not database["fs.files"].count_documents({"filename": "get"}):
                        run("add", "imagestore", env, path, told.memory, "get")
                    figures.setdefault((job, tool), []).append(run(job, tool, env, path, told.memory))
                    for file in database["fs.files"].find({"filename": {"$in": ["ours", "theirs"]}}):
                        database["fs.files"].delete_one({"_id": file["_id"]})
                        database["fs.chunks"].delete_many({"files_id": file["_id"]})
    finally:
        client.drop_database(env["DATABASE"])
        client.close()
    print(f"{env['MONGODB_KIND']}, {told.size} MiB, median of {told.runs}, worst RSS")
    print(f"{'job':8}{'tool':14}{'wall s':>9}{'CPU s':>9}{'RSS MiB':>9}")
    for (job, tool), rows in figures.items():
        wall, cpu = (statistics.median(row[column] for row in rows) for column in (0, 1))
        print(f"{job:8}{tool:14}{wall:9.3f}{cpu:9.3f}{max(row[2] for row in rows):9.1f}")


def run(job: str, tool: str, env: dict[str, str], path: Path, memory: int, name: str = "ours") -> list[float]:
    ours = OURS.replace("LIMITS", f"Limits(memory={memory * MIB})").replace('"ours"', repr(name))
    code = HEAD + (ours if tool == "imagestore" else THEIRS) + MEASURE
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(env), job, tool, path],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    if done.returncode:
        raise SystemExit(f"{job}, {tool}: {done.stderr[-2000:]}")
    figures: list[float] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
