"""Coverage-guided fuzzing of the parsers: python tests/fuzz/formats_atheris.py qcow2 [--seconds 600].

Needs ``pip install atheris``, best in an environment of its own; imagestore is taken from this checkout. The targets
are in ``tests/unit/formats/targets.py``. Starts from the samples and from the corpus in the repository; fails on any
exception, on an input that takes more than 10 s, and above 256 MiB of memory, and leaves the input in --work.
``--keep`` puts the shortest inputs that reached something new into the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "unit")]

CORPUS = REPOSITORY / "tests" / "unit" / "formats" / "data" / "corpus.tar.xz"
MOST = 25_000  # bytes that a target may have in the corpus, before all are compressed
LONGEST = 8192


def fuzz(target: str, arguments: list[str]) -> None:
    """In a process of its own: libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["imagestore.formats"]):
        from formats import targets

    atheris.Setup([sys.argv[0], *arguments], lambda data: targets.run(target, data))
    atheris.Fuzz()


def child(target: str, *arguments: str | Path) -> int:
    command = [sys.executable, __file__, target, "--child", *map(str, arguments)]
    return subprocess.run(command, check=False).returncode


def begin(target: str, folder: Path) -> None:
    """Put the samples and the corpus of a target into a folder."""
    from formats.samples import samples
    from formats.targets import TARGETS, pack

    chosen = TARGETS[target]
    for number, sample in enumerate(each for each in samples() if each.name.startswith(chosen.seeds)):
        data = sample.data[: chosen.longest] if chosen.plain else pack(sample.data, chosen.longest)
        (folder / f"sample-{number:03}").write_bytes(data)
    (folder / "least").write_bytes(b"{}")
    for name, data in kept().items():
        if name.startswith(f"{target}/"):
            (folder / name.partition("/")[2]).write_bytes(data)


def kept() -> dict[str, bytes]:
    """The corpus, by ``target/name``."""
    if not CORPUS.exists():
        return {}
    with tarfile.open(CORPUS) as archive:
        return {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]


def keep(target: str, folder: Path) -> None:
    """Replace what the corpus has of a target: the shortest first, as many as there is room for."""
    corpus = {name: data for name, data in kept().items() if not name.startswith(f"{target}/")}
    found = {path.read_bytes() for path in folder.iterdir() if not path.name.startswith("sample-")}
    room = MOST
    for data in sorted(found, key=lambda data: (len(data), data)):
        room -= len(data)
        if room < 0:
            break
        corpus[f"{target}/{hashlib.sha256(data).hexdigest()[:16]}"] = data
    with tarfile.open(CORPUS, "w:xz", format=tarfile.USTAR_FORMAT, preset=9) as archive:
        for name, data in sorted(corpus.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "imagestore-fuzz")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--child", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    if chosen.child is not None:
        fuzz(chosen.target, chosen.child)
        return 0
    folder = chosen.work / chosen.target
    folder.mkdir(parents=True, exist_ok=True)
    begin(chosen.target, folder)
    from formats.targets import TARGETS

    words = chosen.work / f"{chosen.target}.dict"
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in TARGETS[chosen.target].words)
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    limits = ("-timeout=10", "-rss_limit_mb=256", f"-max_len={LONGEST}", f"-artifact_prefix={chosen.work}/")
    more = [f"-max_total_time={chosen.seconds}", "-print_final_stats=1"]
    if words.stat().st_size:
        more.append(f"-dict={words}")
    code = child(chosen.target, folder, *more, *limits)
    if code == 0 and chosen.keep:
        keep(chosen.target, folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
