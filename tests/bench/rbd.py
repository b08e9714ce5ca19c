"""RBD beside the others: ``python tests/bench/rbd.py [--size MIB] [--sparse MIB] [--count N] [--runs N] [--job NAME]``.

Starts a Ceph cluster of its own below ``--dir`` (``/dev/shm`` by default, so that no disk is measured) and prints, for
every job and tool, the median of wall seconds, the client's CPU seconds (user and system) and its peak RSS in MiB above
that at the start. Jobs: an image of random data of known size, one of unknown size, a sparse one with 5 % data, many of
1 MiB, reading one and throwing it away, the same with holes. The tools take turns, so that what changes on the machine
meets all; compare rows of one run only: client and cluster share the machine.

``IMAGESTORE_BENCH_GLANCE`` names a Python with glance_store 5.7.0; without it that tool is left out, and said so. The
tool "imagestore" computes md5 and sha512 as glance_store does, "sha256" that digest, and "none" none, as ``rbd import``
and ``rbd export`` do, whose time includes their start. glance_store stores the sparse image in its thin mode.
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
import time
import uuid
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SERVERS = HERE.parent / "servers"
sys.path.insert(0, str(SERVERS))

MIB = 1024 * 1024
JOBS = ("known", "unknown", "sparse", "small", "get", "get-sparse")

OURS = """
import json, sys
from imagestore import open_store
conf, pool, job, path, count, tool = sys.argv[1:]
store = open_store("rbd", ceph_conf=conf, pool=pool, user="admin")
store.exists("x")
digests = {"imagestore": ("md5", "sha512"), "sha256": ("sha256",), "none": ()}[tool]

class Unknown:
    def __init__(self, file): self.file = file
    def read(self, n): return self.file.read(n)

def work():
    if job in ("known", "sparse"):
        store.add("image", path, digests=digests)
    elif job == "unknown":
        with open(path, "rb", buffering=0) as file:
            store.add("image", Unknown(file), digests=digests)
    elif job == "small":
        with open(path, "rb") as file:
            data = file.read(1 << 20)
        for number in range(int(count)):
            store.add(f"small-{number}", data, digests=digests)
    else:
        with store.get(store.locate(job)) as reader:
            for _ in reader:
                pass
"""

GLANCE = """
import io, json, os, sys
import glance_store
from oslo_config import cfg
conf_file, pool, job, path, count, tool = sys.argv[1:]
conf = cfg.CONF
conf.register_opt(cfg.DictOpt("enabled_backends"))
conf(["--config-file", path + (".thin" if job == "sparse" else ".conf")])
glance_store.register_store_opts(conf)
glance_store.create_multi_stores(conf)
glance_store.verify_store()

def work():
    if job in ("known", "unknown", "sparse"):
        with open(path, "rb") as file:
            size = 0 if job == "unknown" else os.path.getsize(path)
            glance_store.add_with_multihash(conf, "image", file, size, "old", "sha512")
    elif job == "small":
        with open(path, "rb") as file:
            data = file.read(1 << 20)
        for number in range(int(count)):
            glance_store.add_with_multihash(conf, f"small-{number}", io.BytesIO(data), len(data), "old", "sha512")
    else:
        import rados
        with rados.Rados(conffile=conf_file, name="client.admin") as cluster:
            fsid = cluster.get_fsid()
        for chunk in glance_store.get(f"rbd://{fsid}/{pool}/{job}/snap", "old")[0]:
            pass
"""

MEASURE = """
import json, resource, time
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
    parser.add_argument("--size", type=int, default=1024, help="of the random image, in MiB")
    parser.add_argument("--sparse", type=int, default=10240, help="length of the sparse image, in MiB")
    parser.add_argument("--count", type=int, default=100, help="of small images, 1 MiB each")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--job", action="append", choices=JOBS)
    parser.add_argument("--dir", default="/dev/shm")
    told = parser.parse_args()
    # A bench that is ended stops its cluster too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    directory = Path(tempfile.mkdtemp(prefix="imagestore-bench-", dir=told.dir))
    place = directory / "ceph"
    try:
        command = [SERVERS / "ceph", "start", place, "--store", "bluestore", "--rgw", "no"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        bench(told, directory, dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line))
    finally:
        subprocess.run([SERVERS / "ceph", "stop", place], check=False)
        shutil.rmtree(directory)


def bench(told: argparse.Namespace, directory: Path, env: dict[str, str]) -> None:
    from _rbd import Admin, bindings

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (bindings(), os.environ.get("PYTHONPATH"))))
    admin = Admin(env)
    pool = admin.make_pool()
    dense, sparse = directory / "dense", directory / "sparse"
    make_sources(dense, sparse, told)
    for path in (dense, sparse):
        for suffix, thin in ((".conf", "false"), (".thin", "true")):
            Path(f"{path}{suffix}").write_text(
                "[DEFAULT]\nenabled_backends = old:rbd\n[glance_store]\ndefault_backend = old\n[old]\n"
                f"rbd_store_ceph_conf = {env['CEPH_CONF']}\nrbd_store_user = admin\nrbd_store_pool = {pool}\n"
                f"rbd_thin_provisioning = {thin}\n"
            )
    for name, path in (("get", dense), ("get-sparse", sparse)):
        subprocess.run(rbd(env, "import", str(path), f"{pool}/{name}"), check=True, capture_output=True)
        subprocess.run(rbd(env, "snap", "create", f"{pool}/{name}@snap"), check=True, capture_output=True)
    tools = ["imagestore", "sha256", "none", "rbd"]
    if os.environ.get("IMAGESTORE_BENCH_GLANCE"):
        tools.append("glance_store")
    else:
        print("glance_store is not there: left out")
    print(f"{'job':10} {'tool':13} {'wall s':>8} {'CPU s':>8} {'RSS MiB':>8} {'MB/s':>8}")
    for job in told.job or JOBS:
        path = sparse if "sparse" in job else dense
        results: dict[str, list[list[float]]] = {tool: [] for tool in tools if applies(tool, job)}
        for _ in range(told.runs):
            for tool, runs in results.items():
                runs.append(measure(tool, job, path, told.count, pool, env))
                sweep(admin, pool)
        size = told.count * MIB if job == "small" else path.stat().st_size
        for tool, runs in results.items():
            wall, cpu, rss = (statistics.median(column) for column in zip(*runs, strict=True))
            print(f"{job:10} {tool:13} {wall:8.2f} {cpu:8.2f} {rss:8.0f} {size / wall / 1e6:8.0f}", flush=True)
    admin.close()


def make_sources(dense: Path, sparse: Path, told: argparse.Namespace) -> None:
    with dense.open("wb") as file:
        for _ in range(told.size):
            file.write(random.randbytes(MIB))
    rng = random.Random(5)
    with sparse.open("wb") as file:
        file.truncate(told.sparse * MIB)
        for _ in range(told.sparse // 20):
            file.seek(rng.randrange(told.sparse) * MIB)
            file.write(rng.randbytes(MIB))


def applies(tool: str, job: str) -> bool:
    if job.startswith("get"):
        return tool in ("none", "rbd", "glance_store")
    return tool != "rbd" or job != "small"


def rbd(env: dict[str, str], *arguments: str) -> list[str]:
    return ["rbd", "--conf", env["CEPH_CONF"], "--id", "admin", *arguments]


def sweep(admin: Any, pool: str) -> None:
    with admin.pool(pool) as ioctx:
        names = admin.rbd.list(ioctx)
    for name in names:
        if name not in ("get", "get-sparse"):
            admin.remove(pool, name)


def measure(tool: str, job: str, path: Path, count: int, pool: str, env: dict[str, str]) -> list[float]:
    """Wall seconds, CPU seconds, MiB."""
    if tool != "rbd":
        python = os.environ["IMAGESTORE_BENCH_GLANCE"] if tool == "glance_store" else sys.executable
        script = (GLANCE if tool == "glance_store" else OURS) + MEASURE
        arguments = [env["CEPH_CONF"], pool, job, str(path), str(count), tool]
        done = subprocess.run([python, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tool} {job}: {done.stderr[-2000:]}")
        result: list[float] = json.loads(done.stdout.splitlines()[-1])
        return result
    name = f"image-{uuid.uuid4().hex[:8]}"
    command = {
        "known": rbd(env, "import", "--object-size", "8M", str(path), f"{pool}/{name}"),
        "sparse": rbd(env, "import", "--object-size", "8M", str(path), f"{pool}/{name}"),
        "unknown": rbd(env, "import", "--object-size", "8M", "-", f"{pool}/{name}"),
    }.get(job) or rbd(env, "export", f"{pool}/{job}@snap", "-")
    with path.open("rb") as source:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"rbd {job} failed")
    return [wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]


if __name__ == "__main__":
    main()
