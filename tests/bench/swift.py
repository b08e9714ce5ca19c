"""Swift beside the others: ``python tests/bench/swift.py [--size MIB] [--count N] [--runs N] [--delay SECONDS]``.

Starts an OpenStack Swift of its own (``IMAGESTORE_SWIFT_DIR`` names one that runs already) and prints, for every job
and tool, the median of wall seconds, the client's CPU seconds (user and system) and its peak RSS in MiB above an idle
client. Jobs: an image of known size, one of unknown size, many small ones, a download. The tools take turns.

Client and servers share the machine, and one object server is the bottleneck, so that wall seconds say little. With
``--delay 0.02`` all go through a proxy in a process of its own that holds every byte back for so long in each
direction; then round trips decide, and wall seconds may be compared.

``IMAGESTORE_BENCH_GLANCE`` names a Python with glance_store 5.7.0 and python-swiftclient; its ``swift`` is used too.
imagestore and glance_store compute sha256 (and the md5 that Swift wants); ``swift upload`` computes md5. Sizes are in
whole chunks of 1,024,000 bytes, because glance_store cuts images so.
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
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
SERVERS = HERE.parent / "servers"
UNIT = 1024000

OURS = """
import json, os, sys, time
from imagestore import Limits, open_store
env, job, path, count = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
store = open_store("swift", auth_url=env["OS_AUTH_URL"], user="demo:demo", key=env["OS_PASSWORD"],
                   container=env["CONTAINER"], endpoint=env["STORAGE"])
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
        from concurrent.futures import ThreadPoolExecutor
        with open(path, "rb") as file:
            data = file.read(1 << 20)
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(lambda number: store.add(f"small-ours-{number}", data), range(count)))
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

def small(number):
    import io
    glance_store.add_with_multihash(conf, f"small-glance-{number}", io.BytesIO(data), len(data), "old", "sha256")

with open(path, "rb") as file:
    data = file.read(1 << 20)

def work():
    if job in ("known", "unknown"):
        with open(path, "rb") as file:
            size = os.path.getsize(path) if job == "known" else 0
            glance_store.add_with_multihash(conf, "image-glance", file, size, "old", "sha256")
    elif job == "small":
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(small, range(count)))
    elif job == "get":
        with open(path + ".got", "wb") as out:
            for chunk in glance_store.get(f"swift+config://ref1/{env['CONTAINER']}/get", "old")[0]:
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

PROXY = """
import asyncio, sys
host, port, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])

async def pump(reader, writer):
    loop, queue = asyncio.get_running_loop(), asyncio.Queue(512)
    async def send():
        while (item := await queue.get())[1]:
            await asyncio.sleep(item[0] - loop.time())
            writer.write(item[1])
            await writer.drain()
        writer.close()
    task = asyncio.create_task(send())
    while data := await reader.read(65536):
        await queue.put((loop.time() + delay, data))
    await queue.put((0, b""))
    await task

async def serve(reader, writer):
    try:
        there = await asyncio.open_connection(host, port)
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))
    except OSError:
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="of the large image, in MiB (about)")
    parser.add_argument("--count", type=int, default=200, help="of small images, 1 MiB each")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that the way takes, in each direction")
    parser.add_argument("--job", action="append", choices=["known", "unknown", "small", "get"])
    told = parser.parse_args()
    # So that no server stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    directory = Path(tempfile.mkdtemp(prefix="imagestore-bench-"))
    kept = os.environ.get("IMAGESTORE_SWIFT_DIR")
    place = Path(kept or directory / "swift")
    proxy = None
    try:
        if not kept:
            subprocess.run([SERVERS / "swift", "start", place], stdout=subprocess.DEVNULL, check=True)
        env = dict(line.split("=", 1) for line in (place / "env").read_text().splitlines())
        server = urlsplit(env["SWIFT_PROXY_V3"])
        port = server.port
        if told.delay:
            command = [sys.executable, "-c", PROXY, str(server.hostname), str(port), str(told.delay)]
            proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert proxy.stdout is not None
            port = int(proxy.stdout.readline())
        env["STORAGE"] = f"http://127.0.0.1:{port}/v1/AUTH_{env['OS_PROJECT_ID']}"
        bench(told, directory, env)
    finally:
        if proxy is not None:
            proxy.kill()
            proxy.wait()
            assert proxy.stdout is not None
            proxy.stdout.close()
        if not kept:
            subprocess.run([SERVERS / "swift", "stop", place], check=False)
        shutil.rmtree(directory)


def bench(told: argparse.Namespace, directory: Path, env: dict[str, str]) -> None:
    env["CONTAINER"] = f"bench-{random.randrange(1 << 32):08x}"
    env["CONF"] = str(directory / "glance.conf")
    accounts = directory / "accounts.conf"
    accounts.write_text(f"[ref1]\nauth_address = {env['OS_AUTH_URL']}\nuser = demo:demo\nkey = {env['OS_PASSWORD']}\n")
    Path(env["CONF"]).write_text(
        "[DEFAULT]\nenabled_backends = old:swift\n[glance_store]\ndefault_backend = old\n[old]\n"
        f"swift_store_config_file = {accounts}\ndefault_swift_reference = ref1\n"
        f"swift_store_endpoint = {env['STORAGE']}\n"
        f"swift_store_container = {env['CONTAINER']}\nswift_store_region = RegionOne\n"
        "swift_store_large_object_size = 32\nswift_store_large_object_chunk_size = 32\n"
    )
    path = directory / "image"
    with path.open("wb") as file:
        for _ in range(told.size // 32):
            file.write(random.randbytes(32 * UNIT))
    size = path.stat().st_size
    swift(env, "post", env["CONTAINER"])
    swift(env, "upload", "--use-slo", "--segment-size", "33554432", "--object-name", "get", env["CONTAINER"], str(path))
    tools = ["imagestore", "swift"]
    if os.environ.get("IMAGESTORE_BENCH_GLANCE"):
        tools.append("glance_store")
    else:
        print("glance_store is not there: left out")
    print(f"{'job':8} {'tool':13} {'wall s':>8} {'CPU s':>8} {'RSS MiB':>8} {'MB/s':>8}")
    for job in told.job or ("known", "unknown", "small", "get"):
        results: dict[str, list[list[float]]] = {tool: [] for tool in tools}
        for _ in range(told.runs):
            for tool in tools:
                measured = measure(tool, job, path, told.count, env, directory)
                if measured:
                    results[tool].append(measured)
                sweep(env)
        stored = told.count * 1024 * 1024 if job == "small" else size
        for tool, runs in results.items():
            if runs:
                wall, cpu, rss = (statistics.median(column) for column in zip(*runs, strict=True))
                print(f"{job:8} {tool:13} {wall:8.2f} {cpu:8.2f} {rss:8.0f} {stored / wall / 1e6:8.0f}", flush=True)
    for container in (env["CONTAINER"], f"{env['CONTAINER']}_segments"):
        swift(env, "delete", container)


def environment(env: dict[str, str]) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OS_", "ST_"))}
    return (
        own
        | {name: value for name, value in env.items() if name.startswith("OS_")}
        | {"OS_STORAGE_URL": env["STORAGE"]}
    )


def command(*arguments: str) -> list[str]:
    # Where glance_store is, is what the command needs to speak to Keystone.
    python = os.environ.get("IMAGESTORE_BENCH_GLANCE", sys.executable)
    return [str(Path(python).parent / "swift"), *arguments]


def swift(env: dict[str, str], *arguments: str) -> None:
    done = subprocess.run(command(*arguments), env=environment(env), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"swift {arguments}: {done.stdout}{done.stderr}")


def sweep(env: dict[str, str]) -> None:
    """Remove everything but the image that is downloaded."""
    done = subprocess.run(
        command("list", env["CONTAINER"]), env=environment(env), capture_output=True, text=True, check=True
    )
    names = [name for name in done.stdout.split() if name != "get"]
    if names:
        swift(env, "delete", env["CONTAINER"], *names)


def measure(tool: str, job: str, path: Path, count: int, env: dict[str, str], directory: Path) -> list[float] | None:
    """Wall seconds, CPU seconds, MiB; None if the tool has no such job."""
    if tool != "swift":
        python = sys.executable if tool == "imagestore" else os.environ["IMAGESTORE_BENCH_GLANCE"]
        script = (OURS if tool == "imagestore" else GLANCE) + MEASURE
        arguments = [json.dumps(env), job, str(path), str(count)]
        done = subprocess.run(
            [python, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{tool} {job}: {done.stderr[-2000:]}")
        result: list[float] = json.loads(done.stdout.splitlines()[-1])
        return result
    container = env["CONTAINER"]
    upload = ["upload", "--use-slo", "--segment-size", "33554432"]
    if job == "small":
        small = directory / "small"
        if not small.exists():
            small.mkdir()
            with path.open("rb") as file:
                data = file.read(1024 * 1024)
            for number in range(count):
                (small / f"small-swift-{number}").write_bytes(data)
        words = ["upload", container, *sorted(os.listdir(small))]
        return timed(command(*words), env, small, None)
    words = {
        "known": [*upload, "--object-name", "image-swift", container, str(path)],
        "unknown": [*upload, "--object-name", "image-swift", container, "-"],
        "get": ["download", container, "get", "-o", f"{path}.got"],
    }[job]
    return timed(command(*words), env, directory, path)


def timed(words: list[str], env: dict[str, str], directory: Path, source: Path | None) -> list[float]:
    with open(source or os.devnull, "rb") as stdin:
        began = time.perf_counter()
        process = subprocess.Popen(
            words, env=environment(env), cwd=directory, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        text = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
    if status:
        raise SystemExit(f"{words}: {text.decode()[-1000:]}")
    idle = subprocess.Popen([*words[:1], "--version"], stdout=subprocess.DEVNULL)
    _, _, alone = os.wait4(idle.pid, 0)
    idle.returncode = 0
    cpu = usage.ru_utime + usage.ru_stime - alone.ru_utime - alone.ru_stime
    return [wall, cpu, (usage.ru_maxrss - alone.ru_maxrss) / 1024]


if __name__ == "__main__":
    main()
