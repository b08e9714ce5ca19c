"""S3 beside the others: ``python tests/bench/s3.py [--size MIB] [--count N] [--runs N]``.

Starts a Ceph gateway of its own (``IMAGESTORE_CEPH_DIR`` names one that runs already) and prints, for every job and
tool, the median of wall seconds, the client's CPU seconds (user and system) and its peak RSS in MiB above an idle
client. Jobs: an image of known size, one of unknown size, many small ones, a download. The tools take turns, so that
what changes on the machine meets all; compare rows of one run only: client and server share the machine.

``IMAGESTORE_BENCH_GLANCE`` names a Python with glance_store 5.7.0 and boto3. Tools that are not there are left out, and
said so. imagestore and glance_store compute sha256 (glance_store also md5); ``aws`` and ``rclone`` compute no digest of
the whole image.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVERS = HERE.parent / "servers"
MIB = 1024 * 1024

OURS = """
import json, os, sys, time
from imagestore import open_store
env, job, path, count = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
store = open_store("s3", endpoint=env["S3_ENDPOINT"], region=env["S3_REGION"], bucket=env["BUCKET"], addressing="path",
                   access_key=env["S3_ACCESS_KEY"], secret_key=env["S3_SECRET_KEY"])
store.exists("x")

class Unknown:
    def __init__(self, file): self.file = file
    def read(self, n): return self.file.read(n)

def work():
    if job == "known":
        store.add("image-ours", path)
    elif job == "unknown":
        with open(path, "rb", buffering=0) as file:
            store.add("image-ours", Unknown(file))
    elif job == "small":
        with open(path, "rb") as file:
            data = file.read(1 << 20)
        for number in range(count):
            store.add(f"small-ours-{number}", data)
    elif job == "get":
        store.download(store.locate("get"), path + ".got", overwrite=True)
"""

GLANCE = """
import json, os, sys, time
import glance_store
from oslo_config import cfg
env, job, path, count = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
conf = cfg.CONF
conf.register_opt(cfg.DictOpt("enabled_backends"))
conf(["--config-file", env["CONF"]])
glance_store.register_store_opts(conf)
glance_store.create_multi_stores(conf)

def work():
    if job in ("known", "unknown"):
        with open(path, "rb") as file:
            size = os.path.getsize(path) if job == "known" else 0
            glance_store.add_with_multihash(conf, "image-glance", file, size, "old", "sha256")
    elif job == "small":
        import io
        with open(path, "rb") as file:
            data = file.read(1 << 20)
        for number in range(count):
            source = io.BytesIO(data)
            glance_store.add_with_multihash(conf, f"small-glance-{number}", source, len(data), "old", "sha256")
    elif job == "get":
        scheme_less = env["S3_ENDPOINT"].partition("://")[2]
        with open(path + ".got", "wb") as out:
            for chunk in glance_store.get(f"s3://{scheme_less}/{env['BUCKET']}/get", "old")[0]:
                out.write(chunk)
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
    parser.add_argument("--size", type=int, default=1024, help="of the large image, in MiB")
    parser.add_argument("--count", type=int, default=200, help="of small images, 1 MiB each")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--job", action="append", choices=["known", "unknown", "small", "get"])
    told = parser.parse_args()
    # So that no server stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    directory = Path(tempfile.mkdtemp(prefix="imagestore-bench-"))
    kept = os.environ.get("IMAGESTORE_CEPH_DIR")
    place = kept or str(directory / "ceph")
    try:
        done = subprocess.run(
            [SERVERS / "ceph", "start", place, "--store", "bluestore"], capture_output=True, text=True, check=True
        )
        env = dict(line.split("=", 1) for line in done.stdout.splitlines())
        bench(told, directory, env)
    finally:
        if not kept:
            subprocess.run([SERVERS / "ceph", "stop", place], check=False)
        shutil.rmtree(directory)


def bench(told: argparse.Namespace, directory: Path, env: dict[str, str]) -> None:
    import boto3

    env["BUCKET"] = f"bench-{random.randrange(1 << 32):08x}"
    env["CONF"] = str(directory / "glance.conf")
    Path(env["CONF"]).write_text(
        "[DEFAULT]\nenabled_backends = old:s3\n[glance_store]\ndefault_backend = old\n[old]\n"
        f"s3_store_host = {env['S3_ENDPOINT']}\ns3_store_region_name = {env['S3_REGION']}\n"
        f"s3_store_access_key = {env['S3_ACCESS_KEY']}\ns3_store_secret_key = {env['S3_SECRET_KEY']}\n"
        f"s3_store_bucket = {env['BUCKET']}\ns3_store_bucket_url_format = path\n"
    )
    path = directory / "image"
    with path.open("wb") as file:
        for _ in range(told.size):
            file.write(random.randbytes(MIB))
    s3 = boto3.client(
        "s3",
        endpoint_url=env["S3_ENDPOINT"],
        region_name=env["S3_REGION"],
        aws_access_key_id=env["S3_ACCESS_KEY"],
        aws_secret_access_key=env["S3_SECRET_KEY"],
    )
    s3.create_bucket(Bucket=env["BUCKET"])
    try:
        s3.upload_file(str(path), env["BUCKET"], "get")
        tools = ["imagestore"]
        glance = os.environ.get("IMAGESTORE_BENCH_GLANCE")
        for tool, there in (("glance_store", glance), ("aws", shutil.which("aws")), ("rclone", shutil.which("rclone"))):
            tools += [tool] if there else []
            if not there:
                print(f"{tool} is not there: left out")
        print(f"{'job':8} {'tool':13} {'wall s':>8} {'CPU s':>8} {'RSS MiB':>8} {'MB/s':>8}")
        for job in told.job or ("known", "unknown", "small", "get"):
            results: dict[str, list[list[float]]] = {tool: [] for tool in tools}
            for _ in range(told.runs):
                for tool in tools:
                    measured = measure(tool, job, path, told.count, env)
                    if measured:
                        results[tool].append(measured)
                    sweep(s3, env["BUCKET"])
            size = told.count * MIB if job == "small" else told.size * MIB
            for tool, runs in results.items():
                if runs:
                    wall, cpu, rss = (statistics.median(column) for column in zip(*runs, strict=True))
                    print(f"{job:8} {tool:13} {wall:8.2f} {cpu:8.2f} {rss:8.0f} {size / wall / 1e6:8.0f}", flush=True)
    finally:
        sweep(s3, env["BUCKET"], everything=True)
        s3.delete_bucket(Bucket=env["BUCKET"])
        s3.close()


def sweep(s3: object, bucket: str, *, everything: bool = False) -> None:
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):  # type: ignore[attr-defined]
        for item in page.get("Contents", ()):
            if everything or item["Key"] not in ("get", ".imagestore/features"):
                s3.delete_object(Bucket=bucket, Key=item["Key"])  # type: ignore[attr-defined]


def measure(tool: str, job: str, path: Path, count: int, env: dict[str, str]) -> list[float] | None:
    """Wall seconds, CPU seconds, MiB; None if the tool has no such job."""
    # Some don't fetch what is there already.
    Path(f"{path}.got").unlink(missing_ok=True)
    if tool in ("imagestore", "glance_store"):
        python = sys.executable if tool == "imagestore" else os.environ["IMAGESTORE_BENCH_GLANCE"]
        script = (OURS if tool == "imagestore" else GLANCE) + MEASURE
        arguments = [json.dumps(env), job, str(path), str(count)]
        done = subprocess.run([python, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tool} {job}: {done.stderr[-2000:]}")
        result: list[float] = json.loads(done.stdout.splitlines()[-1])
        return result
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))} | {
        "AWS_ACCESS_KEY_ID": env["S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": env["S3_SECRET_KEY"],
        "AWS_DEFAULT_REGION": env["S3_REGION"],
        "RCLONE_CONFIG": "/nonexistent",
        "RCLONE_CONFIG_R_TYPE": "s3",
        "RCLONE_CONFIG_R_PROVIDER": "Ceph",
        "RCLONE_CONFIG_R_ENV_AUTH": "true",
        "RCLONE_CONFIG_R_ENDPOINT": env["S3_ENDPOINT"],
    }
    aws = ["aws", "--endpoint-url", env["S3_ENDPOINT"], "s3"]
    bucket = env["BUCKET"]
    commands = {
        ("aws", "known"): [*aws, "cp", str(path), f"s3://{bucket}/image-aws"],
        ("aws", "unknown"): [*aws, "cp", "-", f"s3://{bucket}/image-aws"],
        ("aws", "get"): [*aws, "cp", f"s3://{bucket}/get", f"{path}.got"],
        ("rclone", "known"): ["rclone", "copyto", str(path), f"r:{bucket}/image-rclone"],
        ("rclone", "unknown"): ["rclone", "rcat", f"r:{bucket}/image-rclone"],
        ("rclone", "get"): ["rclone", "copyto", f"r:{bucket}/get", f"{path}.got"],
    }
    command = commands.get((tool, job))
    if command is None:
        return None
    with path.open("rb") as source:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        text = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
    if status:
        raise SystemExit(f"{tool} {job}: {text.decode()[-1000:]}")
    return [wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024 - idle(tool, environment)]


def idle(tool: str, environment: dict[str, str]) -> float:
    """What the tool takes for saying its version, in MiB."""
    process = subprocess.Popen([tool, "--version"], env=environment, stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
