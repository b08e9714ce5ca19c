from __future__ import annotations

import os
import random

from hypothesis import example, given
from hypothesis import strategies as st

from imagestore._transfer import BlockPlan, data_runs
from imagestore.driver import Capabilities

MIB = 1 << 20
TB = 10**12


def total(plan, blocks):
    return sum(plan.size_of(i) for i in range(blocks))


def test_without_limits_blocks_are_8_mib():
    plan = BlockPlan(Capabilities(), None, TB)
    assert {plan.size_of(i) for i in (0, 1, 10**6)} == {8 * MIB}
    assert plan.capacity is None


def test_a_smaller_object_of_the_backend_is_the_block():
    plan = BlockPlan(Capabilities(block_min=4 * MIB, block_max=4 * MIB, sparse_unit=4 * MIB), 10 * TB, TB)
    assert plan.size_of(5) == 4 * MIB


def test_known_size_takes_the_shortest_blocks_that_fit():
    s3 = Capabilities(block_min=5 * MIB, block_max=5 * 1024 * MIB, blocks_max=10_000)
    assert BlockPlan(s3, 1000 * MIB, TB).size_of(0) == 8 * MIB
    assert BlockPlan(s3, 8 * MIB * 10_000, TB).size_of(0) == 8 * MIB
    assert BlockPlan(s3, 8 * MIB * 10_000 + 1, TB).size_of(0) == 9 * MIB
    assert BlockPlan(s3, 500 * 10**9, TB).size_of(9_999) == 48 * MIB


def test_unknown_size_doubles_and_fits_one_terabyte_into_s3():
    s3 = Capabilities(block_min=5 * MIB, block_max=5 * 1024 * MIB, blocks_max=10_000)
    plan = BlockPlan(s3, None, TB)
    sizes = [plan.size_of(i) // MIB for i in (0, 1_999, 2_000, 4_000, 6_000, 9_999)]
    assert sizes == [16, 16, 32, 64, 128, 256]
    assert plan.capacity == total(plan, 10_000)
    assert plan.capacity >= TB
    assert total(plan, 2_000) >= 30 * 10**9, "the first 30 GB stay within 16 MiB blocks"


def test_unknown_size_of_5_tb_by_option_and_with_1000_segments():
    s3 = Capabilities(block_min=5 * MIB, block_max=5 * 1024 * MIB, blocks_max=10_000)
    assert BlockPlan(s3, None, 5 * TB).capacity >= 5 * TB
    swift = Capabilities(block_max=5 * 1024 * MIB, blocks_max=1_000)
    plan = BlockPlan(swift, None, TB)
    assert plan.size_of(0) == 16 * MIB
    assert plan.capacity >= TB


@given(
    size=st.integers(0, 10**13),
    blocks_max=st.one_of(st.none(), st.integers(1, 20_000)),
    block_min=st.integers(1, 64 * MIB),
    more=st.one_of(st.none(), st.integers(0, 6 * 1024 * MIB)),
    unit=st.sampled_from([None, 512, 4096, 4 * MIB]),
)
@example(size=8 * MIB * 10_000 + 1, blocks_max=10_000, block_min=1, more=None, unit=None)
def test_every_plan_keeps_the_limits(size, blocks_max, block_min, more, unit):
    if unit:
        block_min = -(-block_min // unit) * unit
        more = more and more // unit * unit
    block_max = None if more is None else block_min + more
    caps = Capabilities(block_min=block_min, block_max=block_max, blocks_max=blocks_max, sparse_unit=unit)
    for known in (size, None):
        plan = BlockPlan(caps, known, 10**12)
        for index in (0, 1, (blocks_max or 10**6) - 1):
            assert plan.size_of(index) >= block_min
            assert block_max is None or plan.size_of(index) <= block_max
            assert unit is None or plan.size_of(index) % unit == 0
        if known is not None and blocks_max is not None and (plan.capacity is None or known <= plan.capacity):
            assert plan.size_of(0) * blocks_max >= known


def check_runs(data, unit):
    rebuilt = bytearray(len(data))
    end = -1
    for start, stop in data_runs(data, unit):
        assert start % unit == 0
        assert stop % unit == 0 or stop == len(data)
        assert start > end or end == -1
        assert end == -1 or start - end >= 64 * 1024
        assert any(data[start : start + unit]), "a run begins with data"
        rebuilt[start:stop] = data[start:stop]
        end = stop
    assert bytes(rebuilt) == data


def test_runs_of_a_dense_and_of_an_empty_block():
    dense = os.urandom(MIB)
    assert list(data_runs(dense, 4096)) == [(0, MIB)]
    assert list(data_runs(bytes(MIB), 4096)) == []
    assert list(data_runs(bytes(MIB) + b"x", 4096)) == [(MIB, MIB + 1)]
    assert list(data_runs(b"x" + bytes(65536 + 4095) + b"y", 4096)) == [(0, 4096), (69632, 69633)]
    assert list(data_runs(b"x" + bytes(65536) + b"y", 4096)) == [(0, 65538)]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 200_000)), max_size=6), st.sampled_from([512, 4096, 65536]))
def test_runs_lose_nothing(areas, unit):
    rng = random.Random(1)
    data = b"".join(rng.randbytes(n) if filled else bytes(n) for filled, n in areas)
    check_runs(data, unit)
