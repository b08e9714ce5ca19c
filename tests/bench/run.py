"""The bench: ``python tests/bench/run.py`` prints tables and, beside each goal, whether it was met.

See README.md in this directory for what is compared and how.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import shutil
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GLANCE_STORE = "5.7.0"
MIB = 1024 * 1024
GIB = 1024 * MIB
DISTURBED = 0.05
"""Share of the machine's CPU time that other processes may use before a measurement counts as disturbed."""

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A measurement: a job of child.py and its arguments."""

    name: str
    job: str
    arguments: dict[str, Any]
    source: Path | None = None

    @property
    def glance(self) -> bool:
        return self.job.startswith("glance_")


@dataclasses.dataclass(frozen=True)
class Goal:
    """``entry`` should be ``factor`` times as fast as ``other``, or as the slowest of several."""

    entry: str
    factor: float
    other: tuple[str, ...]
    label: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Group:
    """Measurements that are compared with each other, and so run in turns."""

    title: str
    entries: tuple[Entry, ...]
    goals: tuple[Goal, ...] = ()
    note: str = ""
    passes: int = 1


class Bench:
    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.directory = directory
        self.quick: bool = options.quick
        self.runs: int = options.runs
        self.calm: bool = options.calm
        self.tree = str(Path(options.tree).resolve())
        self.glance_python: str | None = None
        self.raw: dict[str, dict[str, list[Result]]] = {}
        self.size = 64 * MIB if self.quick else GIB
        self.sparse_size = GIB // 2 if self.quick else 10 * GIB
        self._target = directory / "target"

    # Data

    def random_file(self) -> Path:
        path = self.directory / f"random-{self.size}"
        if not path.exists():
            with path.open("wb") as file:
                for _ in range(0, self.size, 8 * MIB):
                    file.write(os.urandom(8 * MIB))
        return path

    def sparse_file(self) -> Path:
        """5 % data in extents of 64 KiB to 8 MiB at random places (the same ones each time), the rest holes."""
        path = self.directory / f"sparse-{self.sparse_size}"
        if not path.exists():
            chance = random.Random(5)
            left, slots = self.sparse_size // 20, list(range(self.sparse_size // (8 * MIB)))
            chance.shuffle(slots)
            with path.open("wb") as file:
                file.truncate(self.sparse_size)
                while left:
                    length = min(left, chance.randrange(16, 2049) * 4096)
                    file.seek(slots.pop() * 8 * MIB)
                    file.write(os.urandom(length))
                    left -= length
        return path

    def target(self) -> str:
        return str(self._target)

    # Measuring

    def measure(self, entry: Entry) -> Result:
        """One measurement; with --calm repeated, up to three times, while others use the CPU."""
        if not self.calm:
            return self._measure(entry)
        for _ in range(3):
            _wait_for_calm()
            result = self._measure(entry)
            if result["others"] <= DISTURBED:
                return result
        _wait_for_calm()
        return self._measure(entry)

    def _measure(self, entry: Entry) -> Result:
        os.sync()
        if entry.source is not None:
            _warm(entry.source)
        load = os.getloadavg()[0]
        python = self._glance() if entry.glance else sys.executable
        environment = {**os.environ, "PYTHONPATH": self.tree, "PYTHONDONTWRITEBYTECODE": ""}
        if entry.glance:
            del environment["PYTHONPATH"]
        child = subprocess.run(
            [python, str(HERE / "child.py"), entry.job, json.dumps(entry.arguments)],
            stdout=subprocess.PIPE,
            env=environment,
            check=False,
        )
        if child.returncode:
            sys.exit(f"{entry.name} failed")
        result: Result = json.loads(child.stdout)
        result["load"] = load
        return result

    def _glance(self) -> str:
        if self.glance_python is None:
            self.glance_python = glance_python()
        return self.glance_python

    def run(self, name: str, group: Group) -> None:
        results: dict[str, list[Result]] = {entry.name: [] for entry in group.entries}
        self.raw[name] = results
        for turn in range(self.runs):
            for entry in group.entries:
                _progress(f"{name}: run {turn + 1} of {self.runs}: {entry.name}")
                results[entry.name].append(self.measure(entry))
        _progress("")
        _agree(results)
        print(f"\n## {name}: {group.title}\n")
        if group.note:
            print(f"{group.note}\n")
        print_entries(results, group.passes)
        print_goals(group.goals, results)


# Preparations


def glance_python() -> str:
    """The interpreter of an environment with glance_store in it, made when it is first needed."""
    given = os.environ.get("IMAGESTORE_BENCH_GLANCE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = Path(given) if given else cache / "imagestore-bench" / f"glance_store-{GLANCE_STORE}" / "bin" / "python"
    probe = [str(python), "-c", "import importlib.metadata as m; print(m.version('glance_store'))"]
    if not given and (not python.exists() or subprocess.run(probe, capture_output=True, check=False).returncode):
        print(f"installing glance_store {GLANCE_STORE} below {python.parent.parent}", file=sys.stderr)
        venv.create(python.parent.parent, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", f"glance_store=={GLANCE_STORE}"]
        subprocess.run(pip, check=True)
    version = subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip()
    if version != GLANCE_STORE:
        sys.exit(f"{python} has glance_store {version}, not {GLANCE_STORE}")
    return str(python)


def _warm(path: Path) -> None:
    """Bring the data of a file, and nothing else of it, into the page cache."""
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        # Holes that were read are in the cache as pages of zeros: away with them, so that all begin alike.
        if os.fstat(fd).st_blocks * 512 < os.fstat(fd).st_size:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        position, end = 0, os.fstat(fd).st_size
        while position < end:
            try:
                position = os.lseek(fd, position, os.SEEK_DATA)
            except OSError:
                return
            stop = os.lseek(fd, position, os.SEEK_HOLE)
            while position < stop and (data := os.pread(fd, min(MIB, stop - position), position)):
                position += len(data)


def _wait_for_calm() -> None:
    """Wait, for two minutes at most, until other processes leave the CPUs alone for half a second."""
    for _ in range(240):
        busy, total = _cpu_times()
        time.sleep(0.5)
        now_busy, now_total = _cpu_times()
        if now_busy - busy <= DISTURBED * (now_total - total):
            return


def _cpu_times() -> tuple[int, int]:
    with open("/proc/stat", encoding="ascii") as stat:
        numbers = [int(text) for text in stat.readline().split()[1:9]]
    idle = numbers[3] + numbers[4]
    return sum(numbers) - idle, sum(numbers)


def _agree(results: dict[str, list[Result]]) -> None:
    """Whoever computed the same digest must have found the same."""
    found: dict[str, set[str]] = {}
    for result in (result for several in results.values() for result in several):
        for name, value in result.get("digests", {}).items():
            found.setdefault(name, set()).add(value)
    for name, values in found.items():
        if len(values) != 1:
            sys.exit(f"the {name} digests differ: {values}")


def _filesystem(path: Path) -> str:
    command = ["stat", "--file-system", "--format=%T", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# Tables


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:100}\r", end="", file=sys.stderr, flush=True)


def median(results: list[Result], field: str) -> float:
    return float(statistics.median(result[field] for result in results))


def print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]) + " |"

    print(line(head))
    print("|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|")
    for row in rows:
        print(line(row))


def print_entries(results: dict[str, list[Result]], passes: int = 1) -> None:
    rows = []
    for name, several in results.items():
        walls = [result["wall"] / passes for result in several]
        wall = statistics.median(walls)
        size = several[0]["size"] / passes
        disturbed = sum(result["others"] > DISTURBED for result in several)
        loads = [result["load"] for result in several]
        rows.append(
            [
                name,
                f"{wall:.2f}",
                f"{min(walls):.2f}–{max(walls):.2f}",
                f"{size / MIB / wall:.0f}" if size else "",
                f"{median(several, 'cpu') / passes:.2f}",
                "" if several[0]["rss"] is None else f"{max(result['rss'] for result in several):.0f}",
                f"{min(loads):.1f}–{max(loads):.1f}",
                f"{disturbed}/{len(several)}",
            ]
        )
    print_table(["", "wall s", "min–max", "MiB/s", "CPU s", "peak RSS MiB", "load", "disturbed"], rows)


def print_goals(goals: tuple[Goal, ...], results: dict[str, list[Result]]) -> None:
    rows = []
    for goal in goals:
        other = max(goal.other, key=lambda name: median(results[name], "wall"))
        ratio = median(results[other], "wall") / median(results[goal.entry], "wall")
        pairs = [b["wall"] / a["wall"] for a, b in zip(results[goal.entry], results[other], strict=True)]
        pairwise = statistics.median(pairs)
        met = min(ratio, pairwise) >= goal.factor
        rows.append(
            [
                f"{goal.label}{f' ({goal.note})' if goal.note else ''}",
                f"{ratio:.2f}",
                f"{pairwise:.2f}",
                f"{min(pairs):.2f}–{max(pairs):.2f}",
                f"≥ {goal.factor:g}",
                "met" if met else "NOT MET",
            ]
        )
    if rows:
        print()
        print_table(["speed, compared", "of medians", "median of pairs", "min–max", "goal", ""], rows)


# What is measured

NOT_SAME = "not the same digests: glance_store always adds md5"


def _adding(bench: Bench, how: str) -> Group:
    source = bench.random_file()
    known = "known" if how == "file" else "unknown"

    def entry(name: str, job: str, **arguments: Any) -> Entry:
        return Entry(name, job, {"source": str(source), **arguments}, source)

    def ours(name: str, digests: list[str]) -> Entry:
        return entry(name, "ours_add", directory=bench.target(), digests=digests, how=how)

    def glance(name: str, digest: str, **options: Any) -> Entry:
        return entry(name, "glance_add", directory=bench.target(), digest=digest, how=how, options=options)

    # With a reflink, cp would copy nothing.
    no_reflink = ["--reflink=never"] if _filesystem(bench.directory) in ("btrfs", "xfs") else []
    return Group(
        f"add of {bench.size // MIB} MiB of random data, {known} size",
        (
            ours("imagestore md5+sha512", ["md5", "sha512"]),
            glance("glance_store md5+sha512", "sha512"),
            glance("glance_store md5+sha512, chunks of 4 MiB", "sha512", filesystem_store_chunk_size=4 * MIB),
            entry("md5 alone", "digest", algorithm="md5"),
            entry("sha512 alone", "digest", algorithm="sha512"),
            ours("imagestore sha256", ["sha256"]),
            glance("glance_store md5+sha256", "sha256"),
            entry("sha256 alone", "digest", algorithm="sha256"),
            ours("imagestore without digest", []),
            entry("cp && sync -f", "copy", directory=bench.target(), options=no_reflink),
        ),
        (
            Goal("imagestore md5+sha512", 1.6, ("glance_store md5+sha512",), "md5+sha512 : glance_store"),
            Goal("imagestore md5+sha512", 0.75, ("md5 alone", "sha512 alone"), "md5+sha512 : slowest digest alone"),
            Goal("imagestore sha256", 2.5, ("glance_store md5+sha256",), "sha256 : glance_store", NOT_SAME),
            Goal("imagestore without digest", 0.8, ("cp && sync -f",), "no digest : cp && sync -f"),
        ),
        "Every image is on stable storage when its clock stops; the digests alone are only read and hashed.",
    )


def known(bench: Bench) -> Group:
    """Random data of known size."""
    return _adding(bench, "file")


def unknown(bench: Bench) -> Group:
    """Random data of unknown size, from a stream."""
    return _adding(bench, "stream")


def sparse(bench: Bench) -> Group:
    """A large image with 5 % data."""
    source = bench.sparse_file()

    def entry(name: str, job: str, **arguments: Any) -> Entry:
        return Entry(name, job, {"source": str(source), **arguments}, source)

    def ours(name: str, how: str, digests: tuple[str, ...] = ("sha256",)) -> Entry:
        return entry(name, "ours_add", directory=bench.target(), digests=digests, how=how)

    def glance(name: str, **options: Any) -> Entry:
        return entry(name, "glance_add", directory=bench.target(), digest="sha256", how="file", options=options)

    default, thin = "glance_store md5+sha256", "glance_store md5+sha256, thin"
    return Group(
        f"add of {bench.sparse_size / GIB:g} GiB with 5 % data, known size",
        (
            ours("imagestore sha256", "file"),
            ours("imagestore sha256, from a stream", "stream"),
            ours("imagestore without digest", "file", ()),
            ours("imagestore without digest, from a stream", "stream", ()),
            glance(default),
            glance(thin, filesystem_thin_provisioning=True),
            entry("sha256 alone", "digest", algorithm="sha256"),
        ),
        (
            Goal("imagestore sha256", 3, (default,), "sha256 : glance_store", NOT_SAME),
            Goal("imagestore sha256", 20, (thin,), "sha256 : glance_store, thin", NOT_SAME),
        ),
        "The source is a sparse file, given open. The stream hides that it is one, and its size.",
    )


def get(bench: Bench) -> Group:
    """Reading an image to its end."""
    stored, passes = bench.random_file(), 8

    def entry(name: str, job: str, **arguments: Any) -> Entry:
        return Entry(name, job, {"stored": str(stored), "passes": passes, **arguments}, stored)

    return Group(
        f"get of {bench.size // MIB} MiB, from the page cache",
        (
            entry("imagestore, iterated", "ours_get"),
            entry("imagestore, read(64 KiB)", "ours_get_read"),
            entry("plain loop, read(64 KiB)", "read", chunk=64 * 1024),
            entry("plain loop, read(1 MiB)", "read", chunk=MIB),
            entry("glance_store", "glance_get"),
        ),
        (
            Goal("imagestore, iterated", 0.9, ("plain loop, read(64 KiB)",), "get : plain loop of 64 KiB"),
            Goal("imagestore, iterated", 0.9, ("plain loop, read(1 MiB)",), "get : plain loop of 1 MiB"),
        ),
        f"Seconds for one pass; each measurement makes {passes}.",
        passes,
    )


def run_imports(bench: Bench) -> None:
    """The time that an import takes."""
    print("\n## import: milliseconds that it adds to the start of an interpreter\n")
    times = 5 if bench.quick else 15
    statements = ("import imagestore", "from imagestore import Store", "from imagestore import open_store")
    results: dict[str, list[Result]] = {text: [] for text in statements}
    for _ in range(bench.runs):
        for text in statements:
            results[text].append(bench.measure(Entry(text, "imports", {"statement": text, "times": times})))
    bench.raw["import"] = results
    rows = []
    for text in statements:
        values = [result["milliseconds"] for result in results[text]]
        value = statistics.median(values)
        verdict = ["< 30", "met" if value < 30 else "NOT MET"] if text == statements[0] else ["", ""]
        rows.append([text, f"{value:.1f}", f"{min(values):.1f}–{max(values):.1f}", *verdict])
    print_table(["", "ms", "min–max", "goal", ""], rows)


def run_rss(bench: Bench) -> None:
    """A long pipe of unknown size."""
    size = GIB if bench.quick else 20 * GIB
    _room(bench.directory, size)
    entry = Entry("sha256", "piped", {"directory": bench.target(), "size": size, "digests": ["sha256"]})
    result = bench.measure(entry)
    bench.raw["rss20g"] = {entry.name: [result]}
    print(f"\n## rss20g: add of {size / GIB:g} GiB from a pipe of unknown size, sha256\n")
    print_table(
        ["", "value", "allowed", ""],
        [
            ["peak RSS above the baseline, MiB", f"{result['rss']:.0f}", "96", _verdict(result["rss"] <= 96)],
            ["wall s", f"{result['wall']:.0f}", "", ""],
            ["MiB/s", f"{size / MIB / result['wall']:.0f}", "", ""],
            ["CPU s, with the writer of the pipe", f"{result['cpu']:.0f}", "", ""],
            ["load before", f"{result['load']:.1f}", "", ""],
        ],
    )


def run_crowd(bench: Bench) -> None:
    """100 adds and 100 gets of 256 MiB at once in one process."""
    each, many = (32 * MIB, 20) if bench.quick else (256 * MIB, 100)
    _room(bench.directory, each * (many + 2))
    source = bench.directory / "crowd"
    with source.open("wb") as file:
        for _ in range(0, each, 8 * MIB):
            file.write(os.urandom(8 * MIB))
    arguments = {"source": str(source), "directory": bench.target(), "adds": many, "gets": many}
    result = bench.measure(Entry("crowd", "crowd", arguments, source))
    source.unlink()
    bench.raw["crowd"] = {"crowd": [result]}
    print(f"\n## crowd: {many} adds and {many} gets of {each // MIB} MiB at once in one process, sha256\n")
    rss, threads = result["rss"], result["threads"]
    rows = [
        ["peak RSS above the baseline, MiB", f"{rss:.0f}", f"{result['rss_allowed']:.0f}",
         _verdict(rss <= result["rss_allowed"])],
        ["threads, callers included", str(threads), str(result["threads_allowed"]),
         _verdict(threads <= result["threads_allowed"])],
    ]  # fmt: skip
    for kind, (fastest, middle, slowest) in result["seconds"].items():
        text = f"{fastest:.1f}, {middle:.1f}, {slowest:.1f}"
        rows.append([f"{kind}s: fastest, median, slowest, s", text, "", f"{slowest / fastest:.1f} : 1"])
    rows.append(["wall s", f"{result['wall']:.0f}", "", ""])
    rows.append(["CPU s", f"{result['cpu']:.0f}", "", ""])
    rows.append(["load before", f"{result['load']:.1f}", "", ""])
    print_table(["", "value", "allowed", ""], rows)


def _verdict(met: bool) -> str:
    return "met" if met else "NOT MET"


def _room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed + GIB:
        sys.exit(f"{directory} has {free // GIB} GiB free, {needed // GIB + 1} GiB are needed")


def _run_group(group: Callable[[Bench], Group]) -> Callable[[Bench], None]:
    return lambda bench: bench.run(group.__name__, group(bench))


STANDARD: dict[str, Callable[[Bench], None]] = {
    **{group.__name__: _run_group(group) for group in (known, unknown, sparse, get)},
    "import": run_imports,
}
LONG: dict[str, Callable[[Bench], None]] = {"rss20g": run_rss, "crowd": run_crowd}


def _print_machine(directory: Path) -> None:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    print(f"- {time.strftime('%Y-%m-%d %H:%M')}, load {' '.join(f'{load:.2f}' for load in os.getloadavg())}")
    print(f"- {os.cpu_count()} × {models[0] if models else platform.machine()}, Linux {platform.release()}")
    print(f"- {_filesystem(directory)}, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}")
    print(f"- the goals are ratios of speed: the other's seconds by ours; glance_store is {GLANCE_STORE}")


@contextlib.contextmanager
def _workspace(parent: str) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="imagestore-bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small data: shows that the bench works, not how fast")
    parser.add_argument("--runs", type=int, default=5, help="turns of each measurement (default 5)")
    parser.add_argument("--only", action="append", choices=[*STANDARD, *LONG], help="may be given several times")
    parser.add_argument("--dir", default="/var/tmp", help="where the data goes: a disk, not tmpfs (default /var/tmp)")
    parser.add_argument(
        "--calm",
        action="store_true",
        help="on a shared machine: wait for quiet before each measurement, and repeat one, up to three times, if "
        f"other processes used more than {DISTURBED:.0%}% of the CPUs meanwhile",
    )
    parser.add_argument("--tree", default=ROOT, help="a directory with another imagestore in it, to compare versions")
    parser.add_argument("--json", metavar="FILE", help="write every single measurement there")
    options = parser.parse_args()
    # Gigabytes of data would stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with _workspace(options.dir) as directory:
        bench = Bench(options, directory)
        _print_machine(directory)
        for name in options.only or STANDARD:
            {**STANDARD, **LONG}[name](bench)
            sys.stdout.flush()
        if options.json:
            Path(options.json).write_text(json.dumps(bench.raw, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
