"""VMware datastores beside a plain streamed PUT: ``python tests/bench/vmware.py [--size MIB] [--runs N]``.

Starts servers of its own (``IMAGESTORE_VMWARE_DIR`` names some that run already) and prints, for an image of known and
one of unknown size, the median of wall seconds, the client's CPU seconds (user and system) and its peak RSS in MiB
above an idle client. Both compute sha256; ``PUT`` reads 1 MiB, hashes and sends it, in one thread, and does nothing
else: no session, no mark, no look at what was stored, no move. The two take turns, so that what changes on the machine
meets both; client and server share the machine.
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

SCRIPT = Path(__file__).resolve().parent.parent / "servers" / "vmware"
MIB = 1024 * 1024

OURS = """
import json, sys, time
from imagestore import open_store
env, job, path, turn = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
store = open_store("vmware", host=env["VC_STRICT"], user=env["VC_USER"], password=env["VC_PASSWORD"],
                   cacert=env["VC_CACERT"], datastores=["DC0:LocalDS_0"], image_dir="bench")
store.exists("x")

class Unknown:
    def __init__(self, file): self.file = file
    def read(self, n): return self.file.read(n)

def work():
    with open(path, "rb", buffering=0) as file:
        store.add(f"image-{turn}", file if job == "known" else Unknown(file))
"""

PUT = """
import base64, hashlib, http.client, json, os, ssl, sys, time
env, job, path, turn = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
context = ssl.create_default_context(cafile=env["VC_CACERT"])
wire = http.client.HTTPSConnection(env["VC_STRICT"], context=context)
login = base64.b64encode(f"{env['VC_USER']}:{env['VC_PASSWORD']}".encode()).decode()
wire.connect()

def pieces():
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            yield piece

def work():
    headers = {"Authorization": f"Basic {login}"}
    if job == "known":
        headers["Content-Length"] = str(os.path.getsize(path))
    wire.request("PUT", f"/folder/bench/plain-{turn}?dcPath=DC0&dsName=LocalDS_0", pieces(), headers,
                 encode_chunked=job != "known")
    assert wire.getresponse().status in (200, 201)
"""

MEASURE = """
import resource
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="of the image, in MiB")
    parser.add_argument("--runs", type=int, default=5)
    told = parser.parse_args()
    # So that no server stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    directory = Path(tempfile.mkdtemp(prefix="imagestore-bench-"))
    kept = os.environ.get("IMAGESTORE_VMWARE_DIR")
    place = kept or str(directory / "vmware")
    try:
        done = subprocess.run([SCRIPT, "start", place], stdout=subprocess.PIPE, text=True, check=True)
        env = dict(line.split("=", 1) for line in done.stdout.splitlines())
        bench(told, directory, env, Path(place, "strict", "files", "DC0", "LocalDS_0", "bench"))
    finally:
        if not kept:
            subprocess.run([SCRIPT, "stop", place], check=False)
        shutil.rmtree(directory)


def bench(told: argparse.Namespace, directory: Path, env: dict[str, str], files: Path) -> None:
    path = directory / "image"
    with path.open("wb") as file:
        for _ in range(told.size):
            file.write(random.randbytes(MIB))
    print(f"{'job':8} {'tool':11} {'wall s':>8} {'CPU s':>8} {'RSS MiB':>8} {'MB/s':>8}")
    for job in ("known", "unknown"):
        results: dict[str, list[list[float]]] = {"imagestore": [], "PUT": []}
        for turn in range(told.runs):
            for tool, found in results.items():
                script = (OURS if tool == "imagestore" else PUT) + MEASURE
                command = [sys.executable, "-W", "ignore", "-c", script, json.dumps(env), job, str(path), str(turn)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{tool} {job}: {done.stderr[-2000:]}")
                found.append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(files)
        for tool, runs in results.items():
            wall, cpu, _ = (statistics.median(column) for column in zip(*runs, strict=True))
            rss = max(run[2] for run in runs)
            print(
                f"{job:8} {tool:11} {wall:8.2f} {cpu:8.2f} {rss:8.0f} {told.size * MIB / wall / 1e6:8.0f}", flush=True
            )
        ratio = statistics.median(
            ours[0] / plain[0] for ours, plain in zip(results["imagestore"], results["PUT"], strict=True)
        )
        print(f"{job}: imagestore takes {ratio:.2f} of the time of PUT", flush=True)


if __name__ == "__main__":
    main()
