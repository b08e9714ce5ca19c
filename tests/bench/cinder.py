"""Cinder beside glance_store: ``python tests/bench/cinder.py [--size MIB] [--runs N] [--job NAME] [--backend NAME] …``.

Starts a Ceph cluster and a Cinder of its own below ``--dir``, without Keystone, and prints, for every backend, job and
tool, the median of wall seconds, the client's CPU seconds (user and system), its peak RSS in MiB above that at the
start, MB/s, and the number of its requests in Cinder's log. Backends: ``rbd``, and ``loop``, whose volumes are loop
devices over sparse files, by a driver of our own for Cinder. Jobs:

    tiny       an image of 1 MiB: what a volume costs beside its bytes
    known      one of random data (``--size``), of known size
    unknown    one of unknown size (``--unknown``)
    sparse     one with 5 % data (``--sparse``)
    get        reading one (``--size``) and throwing it away
    readers    ``--readers`` threads of one process that read one image (``--read``)

"bytes s" is the wall time less that of "tiny". The tools take turns, so that what changes on the machine meets all;
compare rows of one run only: client, Cinder and storage share the machine. ``--dir`` (by default ``/dev/shm``, so that
no disk is measured) must have room for the longest image and a quarter more, because not every tool leaves holes.

``IMAGESTORE_BENCH_GLANCE`` names a Python with glance_store 5.7.0 and its extra ``cinder``; without it that tool is
left out, and said so. Both compute md5 and sha512 when they add. imagestore leaves out zeros on ``rbd`` only, as an
operator would set it. os-brick's privileged helper, which glance_store starts, is another process, in no figure.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cinder_testing import Project

HERE = Path(__file__).resolve().parent
SERVERS = HERE.parent / "servers"
sys.path.insert(0, str(SERVERS))

MIB = 1024 * 1024
JOBS = ("tiny", "known", "unknown", "sparse", "get", "readers")
BACKENDS = ("rbd", "loop")
STORED = ("get", "readers")

SHARED = """
import json, os, random, re, sys, threading, time
job, told = sys.argv[1], json.loads(sys.argv[2])

class Unknown:
    # Random data without a file, so that a long image takes no room for its source.
    def __init__(self, size): self.rest, self.piece = size, random.Random(7).randbytes(16 << 20)
    def read(self, n):
        n = min(n, self.rest, len(self.piece))
        self.rest -= n
        return self.piece[:n]

def together(count, work):
    failed = []
    def one():
        try:
            work()
        except BaseException as error:
            failed.append(error)
    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    if failed:
        raise failed[0]
"""

OURS = """
from imagestore import open_store
store = open_store(
    "cinder", endpoint_template=told["url"] + "/%(project_id)s", noauth_project=told["project"],
    volume_type=told["type"], connector="minimal", sparse=told["sparse"],
)
store.exists("x")
digests = ("md5", "sha512")

def read():
    with store.get("cinder://" + told["volume"]) as reader:
        for _ in reader:
            pass

def work():
    if job == "unknown":
        store.add("image", Unknown(told["size"]), digests=digests)
    elif job == "get":
        read()
    elif job == "readers":
        together(told["readers"], read)
    else:
        store.add("image", told["path"], digests=digests)
"""

GLANCE = """
import glance_store
from oslo_config import cfg

class Context:
    user_id, project_id, auth_token, service_catalog = "bench", told["project"], None, []
    def to_dict(self): return {"tenant": self.project_id}

conf, context = cfg.CONF, Context()
conf.register_opt(cfg.DictOpt("enabled_backends"))
conf(["--config-file", told["conf"]])
glance_store.register_store_opts(conf)
glance_store.create_multi_stores(conf)
glance_store.verify_store()
# In the file it would be looked up with credentials, and there are none.
conf.set_override("cinder_volume_type", told["type"], group="old")

def add(source, size):
    glance_store.add_with_multihash(conf, "image", source, size, "old", "sha512", context=context)

def read():
    for chunk in glance_store.get("cinder://old/" + told["volume"], "old", context=context)[0]:
        pass

def work():
    if job == "unknown":
        add(Unknown(told["size"]), 0)
    elif job == "get":
        read()
    elif job == "readers":
        together(told["readers"], read)
    else:
        with open(told["path"], "rb") as file:
            add(file, os.path.getsize(told["path"]))
"""

MEASURE = r"""
import resource

def requests():
    # The server writes one down a moment after its answer.
    time.sleep(0.5)
    with open(told["log"]) as file:
        return len(re.findall(r'"(?:GET|POST|PUT|DELETE) /v3/[^"]*HTTP/1', file.read()))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024
earlier = requests()
base, before, began = memory("VmRSS"), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
work()
wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
peak = memory("VmHWM") - base
print(json.dumps([wall, cpu, peak, requests() - earlier]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="of the random image, in MiB")
    parser.add_argument("--unknown", type=int, default=6144, help="length of the one of unknown size, in MiB")
    parser.add_argument("--sparse", type=int, default=10240, help="length of the sparse image, in MiB")
    parser.add_argument("--read", type=int, default=256, help="length of the image that many read, in MiB")
    parser.add_argument("--readers", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--job", action="append", choices=JOBS)
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    parser.add_argument("--dir", default="/dev/shm")
    told = parser.parse_args()
    # A bench that is ended stops its servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    directory = Path(tempfile.mkdtemp(prefix="imagestore-bench-", dir=told.dir))
    try:
        ceph = ["start", directory / "ceph", "--store", "bluestore", "--rgw", "no"]
        subprocess.run([SERVERS / "ceph", *ceph], stdout=subprocess.DEVNULL, check=True)
        command = [SERVERS / "cinder", "start", directory / "cinder", "--ceph", directory / "ceph"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        bench(told, directory, dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line))
    finally:
        for name in ("cinder", "ceph"):
            subprocess.run([SERVERS / name, "stop", directory / name], stdout=subprocess.DEVNULL, check=False)
        shutil.rmtree(directory)


def bench(told: argparse.Namespace, directory: Path, env: dict[str, str]) -> None:
    from _rbd import bindings
    from cinder_testing import Project

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (bindings(), os.environ.get("PYTHONPATH"))))
    project = Project(env["CINDER_URL"], env["CINDER_PROJECT"])
    glance = os.environ.get("IMAGESTORE_BENCH_GLANCE")
    tools = ["imagestore", *(["glance_store"] if glance else [])]
    if not glance:
        print("glance_store is not there: left out")
    sizes = {"tiny": 1, "known": told.size, "unknown": told.unknown, "sparse": told.sparse}
    sizes |= {"get": told.size, "readers": told.read}
    wanted = told.job or JOBS
    make_sources(directory, {job: sizes[job] for job in wanted if job != "unknown"})
    print(
        f"{'backend':8} {'job':8} {'tool':13} {'wall s':>8} {'bytes s':>8} {'CPU s':>8} {'RSS MiB':>8} {'MB/s':>8} "
        f"{'requests':>8}"
    )
    for backend in told.backend or BACKENDS:
        parameters: dict[str, Any] = {
            "url": env["CINDER_URL"],
            "project": env["CINDER_PROJECT"],
            "type": f"{backend}-multi",
            "sparse": backend == "rbd",
            "readers": told.readers,
            "log": env["CINDER_LOG"],
            "conf": str(glance_conf(directory, env, glance)),
        }
        tiny: dict[str, float] = {}
        for job in wanted:
            parameters |= {"path": str(directory / job), "size": sizes[job] * MIB}
            parameters["volume"] = stored(project, parameters, job) if job in STORED else ""
            results: dict[str, list[list[float]]] = {tool: [] for tool in tools}
            for _ in range(told.runs):
                for tool, runs in results.items():
                    runs.append(measure(tool, job, parameters))
                    sweep(project, parameters["volume"])
            size = sizes[job] * MIB * (told.readers if job == "readers" else 1)
            for tool, runs in results.items():
                wall, cpu, rss, count = (statistics.median(column) for column in zip(*runs, strict=True))
                if job == "tiny":
                    tiny[tool] = wall
                part = f"{wall - tiny[tool]:8.2f}" if tool in tiny and job not in ("tiny", *STORED) else " " * 8
                print(
                    f"{backend:8} {job:8} {tool:13} {wall:8.2f} {part} {cpu:8.2f} {rss:8.0f} {size / wall / 1e6:8.0f} "
                    f"{count:8.0f}",
                    flush=True,
                )
            sweep(project, "")


def make_sources(directory: Path, sizes: dict[str, int]) -> None:
    rng = random.Random(5)
    for job, size in sizes.items():
        with (directory / job).open("wb") as file:
            if job == "sparse":
                file.truncate(size * MIB)
                for _ in range(size // 20):
                    file.seek(rng.randrange(size) * MIB)
                    file.write(rng.randbytes(MIB))
            else:
                for _ in range(size):
                    file.write(rng.randbytes(MIB))


def glance_conf(directory: Path, env: dict[str, str], python: str | None) -> Path:
    path = directory / "glance-api.conf"
    helper = Path(python or sys.executable).with_name("privsep-helper")
    path.write_text(
        "[DEFAULT]\nenabled_backends = old:cinder\n[glance_store]\ndefault_backend = old\n"
        f"[privsep_osbrick]\nhelper_command = {helper}\n"
        f"[oslo_concurrency]\nlock_path = {directory}\n[os_brick]\nlock_path = {directory}\n"
        f"[old]\ncinder_endpoint_template = {env['CINDER_URL']}/%(tenant)s\n"
        # Each reader attaches the volume for itself, one after the other.
        "cinder_attachment_retry_attempts = 60\n"
    )
    return path


def stored(project: Project, parameters: dict[str, Any], job: str) -> str:
    """The volume of an image that is to be read; imagestore puts it there."""
    script = SHARED + OURS + "\nstore.add(job, told['path'])\n"
    command = [sys.executable, "-W", "ignore", "-c", script, job, json.dumps(parameters)]
    subprocess.run(command, capture_output=True, check=True)
    return next(key for key, each in project.volumes().items() if each["metadata"].get("glance_image_id") == job)


def sweep(project: Project, but: str) -> None:
    for key in project.volumes():
        if key != but:
            project.delete(key)


def measure(tool: str, job: str, parameters: dict[str, Any]) -> list[float]:
    """Wall seconds, CPU seconds, MiB, requests."""
    python = os.environ["IMAGESTORE_BENCH_GLANCE"] if tool == "glance_store" else sys.executable
    script = SHARED + (GLANCE if tool == "glance_store" else OURS) + MEASURE
    command = [python, "-W", "ignore", "-c", script, job, json.dumps(parameters)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} {job}: {done.stderr[-2000:]}")
    result: list[float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
