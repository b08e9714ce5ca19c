"""Damaged images: no exception, no endless work, and no refused image that a flip makes acceptable unexplained."""

from __future__ import annotations

import random

import pytest
from formats.mutations import Mutant, check, mutate, pick
from formats.samples import run, sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BOUNDARIES = {
    "good/qcow2-v3.qcow2": (0, 3, 4, 7, 8, 71, 72, 103, 104, 112, 65535, 65536, 131072, 196608),
    "good/qcow2-luks.qcow2": (104, 111, 112, 119, 120, 124, 135, 136),
    "good/vmdk-stream-ovftool-style.vmdk": (0, 3, 4, 78, 79, 511, 512, 513, 1023, 1024, 11263, 65536, 134655),
    "good/vhd-dynamic.vhd": (0, 7, 8, 511, 512, 1535, 1536, 4197376, 4197887),
    "good/vhd-fixed-handmade.vhd": (1048576, 1048577, 1049087),
    "good/vhdx-dynamic.vhdx": (8, 65535, 65536, 131072, 196608, 262144, 327680, 1048575, 1048576, 3145728, 3211264),
    "good/vdi-dynamic.vdi": (64, 67, 68, 511, 512, 1024),
    "good/parallels.hds": (16, 63, 64, 1024),
    "good/luks1.luks": (6, 7, 8, 207, 208, 591, 592, 4096),
    "good/iso-plain.iso": (32768, 32769, 32774, 34815, 34816, 36864, 38912),
    "good/raw-gpt-handmade.img": (511, 512, 1023, 1024, 17407, 17408, 2097151),
    "good/ova-sha512.ova": (511, 512, 1024, 2048, 2560, 142847, 142848, 143359),
    "good/docker-save-25.tar": (511, 512, 1024, 19455, 20479),
    "good/compressed-qcow2.gz": (1, 2, 3, 10, 1983, 1991),
}
# Cut there, nothing is lost that counts.
STILL_GOOD = {
    ("good/vhd-dynamic.vhd", 4197887): "a footer of 511 bytes, as there once were",
    ("good/vhd-fixed-handmade.vhd", 1049087): "a footer of 511 bytes, as there once were",
    ("good/ova-sha512.ova", 142847): "padding behind the two end marks",
    ("good/ova-sha512.ova", 142848): "padding behind the two end marks",
    ("good/ova-sha512.ova", 143359): "padding behind the two end marks",
    ("good/docker-save-25.tar", 19455): "padding behind the two end marks",
    ("good/docker-save-25.tar", 20479): "padding behind the two end marks",
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_truncation(name: str) -> None:
    whole = sample(name)
    disk = whole.disk.replace("raw", "gpt") if "gpt" in name else whole.disk
    assert run(whole.data, disk, whole.container)[0].accepted
    for length in BOUNDARIES[name]:
        assert length < whole.size
        mutant = Mutant(whole, (), length)
        assert check(mutant) is None
        inspection, _ = run(mutant.data, disk, whole.container)
        assert inspection.size == length
        assert inspection.accepted == ((name, length) in STILL_GOOD), (length, inspection.findings)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.integers(min_value=0))
def test_flips(seed: int) -> None:
    source = random.Random(seed)
    mutant = mutate(source, pick(source))
    assert check(mutant) is None, (mutant.sample.name, mutant.places)
