"""One measurement, in a process of its own: ``child.py JOB JSON`` prints its result as a line of JSON.

Runs under two interpreters: the one that runs the bench, and the one that has glance_store. Nothing is imported before
it is needed, and the clock starts after the imports and after the store was opened.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Self

MIB = 1024 * 1024


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def _machine_user() -> float:
    """Seconds of user time of all processes of the machine."""
    with open("/proc/stat", encoding="ascii") as stat:
        user, nice = stat.readline().split()[1:3]
    return (int(user) + int(nice)) / os.sysconf("SC_CLK_TCK")


def _own() -> tuple[float, float]:
    """Seconds of user and system time of this process and its children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime for usage in usages), sum(usage.ru_stime for usage in usages)


class Meter:
    """Measures what happens between ``with`` and its end: seconds, CPU seconds, peak memory above that at the start."""

    def __enter__(self) -> Self:
        gc.collect()
        # proc(5): writing 5 resets VmHWM, the peak of the resident memory, to the present value.
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        self._base = _status("VmRSS")
        self._machine = _machine_user()
        self._user, self._system = _own()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._began
        user, system = _own()
        # The kernel counts for the machine in ticks, so a few of them mean nothing.
        others = _machine_user() - self._machine - (user - self._user) - 0.03
        self.cpu = user - self._user + system - self._system
        self.rss = max(0, _status("VmHWM") - self._base) / 1024
        self.others = max(0.0, others) / (self.wall * (os.cpu_count() or 1))

    def result(self, **more: Any) -> dict[str, Any]:
        return {"wall": self.wall, "cpu": self.cpu, "rss": self.rss, "others": self.others, **more}


class ReadOnly:
    """A stream with ``read(n)`` and nothing else, as a request body is: nobody can ask it for its size."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read


def _sync(*paths: str) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _source(file: BinaryIO, how: str) -> Any:
    return ReadOnly(file) if how == "stream" else file


# imagestore


def _store(directory: str) -> Any:
    from imagestore import open_store

    store = open_store("file", datadir=directory)
    assert store.capabilities.commit_proof in (True, False)
    return store


def ours_add(source: str, directory: str, digests: list[str], how: str = "file") -> dict[str, Any]:
    """``how``: file (an open file of declared size) or stream (``read(n)`` only, of unknown size)."""
    store = _store(directory)
    with open(source, "rb") as file:
        size = None if how == "stream" else os.fstat(file.fileno()).st_size
        with Meter() as meter:
            added = store.add("image", _source(file, how), size=size, digests=digests)
    store.close()
    return meter.result(digests=dict(added.digests), size=added.size)


def ours_get(stored: str, passes: int) -> dict[str, Any]:
    store = _store(os.path.dirname(stored))
    with Meter() as meter:
        total = 0
        for _ in range(passes):
            with store.get(f"file://{stored}") as image:
                for chunk in image:
                    total += len(chunk)
    store.close()
    return meter.result(size=total)


def ours_get_read(stored: str, passes: int) -> dict[str, Any]:
    """The same as `ours_get`, with ``read(n)`` in place of iteration."""
    store = _store(os.path.dirname(stored))
    with Meter() as meter:
        total = 0
        for _ in range(passes):
            with store.get(f"file://{stored}") as image:
                while chunk := image.read(64 * 1024):
                    total += len(chunk)
    store.close()
    return meter.result(size=total)


# glance_store


def _glance(directory: str, options: dict[str, Any]) -> Any:
    import glance_store  # type: ignore[import-not-found]  # is in an environment of its own
    from oslo_config import cfg

    conf = cfg.CONF
    conf([], project="bench", default_config_files=[], default_config_dirs=[])
    conf.register_opts([cfg.DictOpt("enabled_backends")])
    conf.set_override("enabled_backends", {"bench": "file"})
    glance_store.register_store_opts(conf)
    conf.set_override("default_backend", "bench", group="glance_store")
    for name, value in {"filesystem_store_datadir": directory, **options}.items():
        conf.set_override(name, value, group="bench")
    glance_store.create_multi_stores(conf)
    glance_store.verify_store()
    return glance_store, conf


def glance_add(
    source: str, directory: str, digest: str, how: str = "file", options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Ends with a sync of file and directory, so that the image is as durable as ours."""
    glance_store, conf = _glance(directory, options or {})
    with open(source, "rb") as file:
        size = 0 if how == "stream" else os.fstat(file.fileno()).st_size
        with Meter() as meter:
            uri, size, md5, value, _ = glance_store.add_with_multihash(
                conf, "image", _source(file, how), size, "bench", digest
            )
            _sync(uri.removeprefix("file://"), directory)
    return meter.result(digests={"md5": md5, digest: value}, size=size)


def glance_get(stored: str, passes: int) -> dict[str, Any]:
    glance_store, _ = _glance(os.path.dirname(stored), {})
    with Meter() as meter:
        total = 0
        for _ in range(passes):
            chunks, _ = glance_store.get(f"file://{stored}", "bench")
            for chunk in chunks:
                total += len(chunk)
    return meter.result(size=total)


# What there is without either


def copy(source: str, directory: str, options: list[str]) -> dict[str, Any]:
    target = os.path.join(directory, "image")
    with Meter() as meter:
        subprocess.run(["cp", *options, "--", source, target], check=True)
        subprocess.run(["sync", "-f", "--", target], check=True)
    return meter.result(size=os.path.getsize(target), rss=None)


def digest(source: str, algorithm: str) -> dict[str, Any]:
    found = hashlib.new(algorithm)
    total = 0
    with open(source, "rb", buffering=0) as file, Meter() as meter:
        while data := file.read(MIB):
            found.update(data)
            total += len(data)
    return meter.result(digests={algorithm: found.hexdigest()}, size=total)


def read(stored: str, passes: int, chunk: int) -> dict[str, Any]:
    total = 0
    with Meter() as meter:
        for _ in range(passes):
            with open(stored, "rb", buffering=0) as file:
                while data := file.read(chunk):
                    total += len(data)
    return meter.result(size=total)


def imports(statement: str, times: int) -> dict[str, Any]:
    """Milliseconds that a statement adds to the start of an interpreter: medians of turns with and without it."""
    walls: dict[str, list[float]] = {"pass": [], statement: []}
    with Meter() as meter:
        for turn in range(times + 1):
            for text, found in walls.items():
                began = time.perf_counter()
                subprocess.run([sys.executable, "-c", text], check=True)
                if turn:
                    found.append(time.perf_counter() - began)
    with_it, without = (sorted(found)[times // 2] for found in (walls[statement], walls["pass"]))
    return meter.result(rss=None, size=0, milliseconds=(with_it - without) * 1000)


# Long runs

_PRODUCER = """
import os, sys
size = int(sys.argv[1])
data = os.urandom(1 << 20)
while size > 0:
    size -= os.write(1, data[:size] if size < len(data) else data)
"""


def piped(directory: str, size: int, digests: list[str]) -> dict[str, Any]:
    """A pipe of unknown size, filled by another process."""
    store = _store(directory)
    with subprocess.Popen([sys.executable, "-c", _PRODUCER, str(size)], stdout=subprocess.PIPE) as producer:
        assert producer.stdout is not None
        with Meter() as meter:
            added = store.add("image", producer.stdout, digests=digests)
    assert added.size == size == os.path.getsize(os.path.join(directory, "image"))
    store.close()
    return meter.result(size=added.size)


def crowd(source: str, directory: str, adds: int, gets: int) -> dict[str, Any]:
    """So many adds and gets at once, in one process, each in a thread of its own."""
    store = _store(directory)
    stored = store.add("stored", source).location
    added_threads = threading.active_count()
    total = os.path.getsize(source)
    ready = threading.Barrier(adds + gets + 1)
    seconds: dict[str, list[float]] = {"add": [], "get": []}
    failures: list[str] = []
    most = _Peak()

    def run(kind: str, job: Callable[[], int]) -> None:
        ready.wait()
        began = time.perf_counter()
        try:
            assert job() == total
        except Exception as error:  # noqa: BLE001 - told to the main thread
            failures.append(f"{kind}: {error!r}")
        seconds[kind].append(time.perf_counter() - began)

    def one_get() -> int:
        with store.get(stored) as image:
            return sum(len(chunk) for chunk in image)

    def one_add(number: int) -> int:
        with open(source, "rb") as file:
            return int(store.add(f"image-{number}", ReadOnly(file)).size)

    threads = [threading.Thread(target=run, args=("add", lambda n=n: one_add(n))) for n in range(adds)]
    threads += [threading.Thread(target=run, args=("get", one_get)) for _ in range(gets)]
    with Meter() as meter, most:
        for thread in threads:
            thread.start()
        ready.wait()
        for thread in threads:
            thread.join()
    if failures:
        raise RuntimeError("; ".join(failures[:5]))
    limits = store.limits
    store.close()
    return meter.result(
        size=total * (adds + gets),
        threads=most.threads - 2,
        threads_before=added_threads,
        threads_allowed=2 * limits.workers + adds + gets,
        rss_allowed=limits.memory_total / MIB + 64,
        seconds={kind: (min(found), sorted(found)[len(found) // 2], max(found)) for kind, found in seconds.items()},
    )


class _Peak:
    """The largest number of threads of this process meanwhile; its own and the main one are among them."""

    def __enter__(self) -> Self:
        self.threads = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self.threads = max(self.threads, _status("Threads"))


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job
    for job in (ours_add, ours_get, ours_get_read, glance_add, glance_get, copy, digest, read, imports, piped, crowd)
}


@contextlib.contextmanager
def _directory(arguments: dict[str, Any]) -> Iterator[None]:
    """Jobs that write begin with an empty directory and leave none."""
    directory = arguments.get("directory")
    if directory is not None:
        os.makedirs(directory)
    try:
        yield
    finally:
        if directory is not None:
            shutil.rmtree(directory)


def main() -> None:
    arguments = json.loads(sys.argv[2])
    with _directory(arguments):
        print(json.dumps(JOBS[sys.argv[1]](**arguments)))


if __name__ == "__main__":
    main()
