"""What fuzzing found worth keeping is inspected again: every input, under every declaration of its target."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from formats.samples import samples
from formats.targets import TARGETS, image, pack, run

CORPUS = Path(__file__).parent / "data" / "corpus.tar.xz"


def kept() -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {target: [] for target in TARGETS}
    with tarfile.open(CORPUS) as archive:
        for member in archive:
            found[member.name.partition("/")[0]].append(archive.extractfile(member).read())  # type: ignore[union-attr]
    return found


KEPT = kept()


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    assert KEPT[target], "nothing is kept of it"
    for data in KEPT[target]:
        run(target, data)


def test_the_corpus_is_small() -> None:
    assert CORPUS.stat().st_size < 300_000


def test_every_sample_is_a_begin_of_some_target() -> None:
    begins = tuple(begin for target in TARGETS.values() for begin in target.seeds)
    missing = [each.name for each in samples() if not each.name.startswith(begins)]
    assert not missing


def test_inputs_become_the_images_that_they_were_made_of() -> None:
    for name, target in TARGETS.items():
        for sample in samples():
            if sample.name.startswith(target.seeds) and not target.plain and sample.size <= target.longest:
                packed = pack(sample.data, target.longest, flags=0, most=1 << 20)
                assert image(name, packed) == sample.data
