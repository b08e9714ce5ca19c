"""Damaged samples, and what must hold for each."""

from __future__ import annotations

import functools
import random
import time
from dataclasses import dataclass

from formats.samples import Sample, sample, samples

from imagestore.formats import Inspection, Inspector, Policy

LARGE = 4 << 20
SECONDS = 20.0  # of CPU time; a healthy inspection takes milliseconds

# Where a refused sample may become acceptable by a flip, and why; offsets from its start, or from its end if
# negative. All other such flips must be at the place that a finding names.
REPAIRS: dict[str, tuple[tuple[int, int, str], ...]] = {
    "q2": ((4, 8, "version 2 has none of the fields of version 3"),),
    "q30": ((4, 8, "version 2 has none of the fields of version 3"),),
    "q07": ((4, 8, "in version 2 the extensions begin earlier, where this one has an end mark"),),
    "q08": ((4, 8, "version 2 has none of the fields of version 3"),),
    "q38": (
        (40, 48, "another L1 table: the guest's disk begins elsewhere"),
        (0x30000, 0x30008, "another L2 table"),
        (0x40000, 0x40008, "another first cluster"),
    ),
    "z08": ((0, 6, "another window, or no signature"),),
}


@dataclass(frozen=True)
class Mutant:
    sample: Sample
    places: tuple[tuple[int, int], ...]  # offset, new byte
    length: int

    @property
    def data(self) -> bytes:
        data = bytearray(self.sample.data[: self.length])
        for offset, value in self.places:
            if offset < len(data):
                data[offset] = value
        return bytes(data)


@functools.cache
def hot(name: str) -> tuple[int, ...]:
    """Offsets of bytes that are not zero, which is where structures are; at most a few thousand per MiB."""
    data = sample(name).data
    found = []
    for start in range(0, min(len(data), LARGE), 4096):
        block = data[start : start + 4096]
        if any(block):
            found += [start + index for index, byte in enumerate(block) if byte][:: 1 if start < 65536 else 16]
    return tuple(found) or (0,)


@functools.cache
def usual() -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    every = [each for each in samples() if each.size]
    small = tuple(each for each in every if each.size <= LARGE)
    return small, tuple(each for each in every if each.size > LARGE)


def pick(source: random.Random) -> Sample:
    """A sample; rarely one of the large ones, which take longer."""
    small, large = usual()
    return source.choice(large if source.random() < 0.01 else small)


def mutate(source: random.Random, chosen: Sample) -> Mutant:
    size = chosen.size
    places = []
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        kind = source.random()
        if kind < 0.4:
            offset = source.randrange(min(size, 1024))
        elif kind < 0.8:
            offset = source.choice(hot(chosen.name))
        elif kind < 0.9:
            offset = source.randrange(min(size, 65536))
        else:
            offset = max(size - 1 - source.randrange(2048), 0)
        old = chosen.data[offset]
        value = source.choice((old ^ 1 << source.randrange(8), source.randrange(256), 0, 255, (old + 1) % 256))
        places.append((offset, value))
    length = size
    if source.random() < 0.1:
        length = source.choice((source.randrange(size), source.randrange(min(size, 4096)), size - size % 512))
        places = []
    return Mutant(chosen, tuple(places), length)


def inspect(mutant: Mutant) -> Inspection:
    inspector = Inspector(disk_format=mutant.sample.disk, container_format=mutant.sample.container)
    began = time.process_time()
    inspector.feed(mutant.data)
    result = inspector.finish()
    assert time.process_time() - began < SECONDS, "it took too long"
    assert (inspector.refusal is None) == result.accepted
    return result


@functools.cache
def original(name: str) -> Inspection:
    return inspect(Mutant(sample(name), (), sample(name).size))


def explained(mutant: Mutant, result: Inspection) -> bool:
    """Whether the image is no longer of a format that it was refused for, or the changed bytes are at a place that
    a fatal finding of the original names, or one of `REPAIRS`.
    """
    if set(original(mutant.sample.name).formats) - set(result.formats):
        return True
    size = mutant.sample.size
    changed = [offset for offset, value in mutant.places if mutant.sample.data[offset] != value]
    reasons = [each for each in original(mutant.sample.name).findings if Policy().refuses(each)]
    for each in reasons:
        if each.offset is not None and any(each.offset - 8 <= offset < each.offset + 64 for offset in changed):
            return True
    name = mutant.sample.name.partition("/")[2]
    repairs = [each for prefix, places in REPAIRS.items() if name.startswith(prefix) for each in places]
    return any(
        start + (size if start < 0 else 0) <= offset < stop + (size if start < 0 else 0)
        for start, stop, _ in repairs
        for offset in changed
    )


def check(mutant: Mutant) -> str | None:
    """None, or what does not hold."""
    result = inspect(mutant)
    if any(each.code == "parser.failed" for each in result.findings):
        return f"a parser failed: {[str(each) for each in result.findings]}"
    if (
        result.accepted
        and not original(mutant.sample.name).accepted
        and mutant.places
        and not explained(mutant, result)
    ):
        return f"accepted; before: {[str(each) for each in original(mutant.sample.name).findings]}"
    return None
