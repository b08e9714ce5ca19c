"""Copies between every pair of stores that need no server, cut at random: whole or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import random

import pytest

from imagestore import Limits, Retry, Store, StoreError, Stores
from imagestore._pool import Engine
from imagestore.driver import Options
from imagestore.drivers.filesystem import FilesystemDriver
from imagestore.drivers.memory import MemoryDriver
from imagestore.errors import Unavailable
from imagestore.testing import Faults, FaultyDriver

BLOCK = 64 * 1024
PERSONALITIES = ("plain", "s3", "s3-unconditional", "swift", "cinder", "sheepdog", "gridfs", "vmware")
NAMES = ("file", *PERSONALITIES)
CUTS = 6
FAST = Retry(attempts=2, first=0.001, longest=0.002)


def defaults(driver, **more):
    return Options({option.dest: option.default for option in driver.options} | more)


def make_driver(name, store, tmp_path):
    if name == "file":
        options = defaults(FilesystemDriver, datadir=str(tmp_path / store), staging="named", fsync=False)
        return FilesystemDriver(options, store=store)
    return MemoryDriver(defaults(MemoryDriver, personality=name, block_size=BLOCK), store=store)


@pytest.fixture(scope="module")
def image():
    rng = random.Random(11)
    return rng.randbytes(5 * BLOCK) + bytes(9 * BLOCK) + rng.randbytes(3 * BLOCK + 77)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("origin", NAMES)
def test_a_copy_is_whole_or_nothing(origin, target, image, tmp_path):
    rng = random.Random(f"{origin}-{target}")
    engine = Engine(Limits())
    faults = {"a": Faults(), "b": Faults()}
    drivers = [
        FaultyDriver(make_driver(kind, name, tmp_path), faults[name]) for name, kind in (("a", origin), ("b", target))
    ]
    with Stores(
        [Store(driver, engine=engine, retry=FAST, _block_size=BLOCK) for driver in drivers], engine=engine
    ) as stores:
        place = stores["a"].add("image", image).location
        expected = {"sha256": hashlib.sha256(image).hexdigest()}
        whole = stores.copy(place, "b", image_id="whole", expected=expected)
        with stores["b"].get(whole.location) as reader:
            assert reader.read() == image
        for number in range(CUTS):
            end, operation = rng.choice(
                [("a", "read"), ("a", "chunk"), ("b", "create"), ("b", "write"), ("b", "commit")]
            )
            faults[end].fail(
                operation,
                Unavailable("cut"),
                at=faults[end].calls[operation] + rng.randint(1, 4),
                times=rng.choice([1, None]),
                after=rng.random() < 0.5,
            )
            image_id = f"copy-{number}"
            with contextlib.suppress(StoreError):
                stores.copy(place, "b", image_id=image_id, expected=expected)
            faults[end].heal()
            if stores["b"].exists(image_id):
                with stores["b"].get(stores["b"].locate(image_id), expected=expected) as reader:
                    assert reader.read() == image, (end, operation)
                stores["b"].delete(stores["b"].locate(image_id))
            stores["b"].collect(older_than=0, include_alive=True)
            assert list(stores["b"].uploads()) == [], (end, operation)
    assert engine.budget.used == 0
