from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from imagestore import _pool
from imagestore._models import Limits, TransferStarted
from imagestore._pool import Budget, Engine, Lane, Share
from imagestore.errors import Cancelled, StoreError


def nothing():
    return None


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def test_budget_serves_in_order():
    budget = Budget(10)
    budget.acquire(8, empty_handed=True, check=nothing)
    served = []

    def taker(name, amount):
        budget.acquire(amount, empty_handed=False, check=nothing)
        served.append(name)

    big = threading.Thread(target=taker, args=("big", 9))
    big.start()
    wait_until(lambda: len(budget._waiting) == 1)
    small = threading.Thread(target=taker, args=("small", 2))
    small.start()
    wait_until(lambda: len(budget._waiting) == 2)
    assert not budget.try_acquire(1), "nobody overtakes those who wait"
    budget.release(8)
    big.join()
    assert served == ["big"], "the second fits only after the first gave back"
    budget.release(9)
    small.join()
    assert served == ["big", "small"]
    assert budget.used == 2
    assert budget.peak == 9


def test_budget_lets_one_block_larger_than_all_pass():
    budget = Budget(10)
    budget.acquire(100, empty_handed=True, check=nothing)
    assert budget.used == 100


def test_waiting_for_the_budget_can_be_cancelled():
    budget = Budget(10)
    budget.acquire(10, empty_handed=True, check=nothing)

    def check():
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        budget.acquire(5, empty_handed=False, check=check)
    budget.release(10)
    assert budget.used == 0
    assert budget.try_acquire(10)


def test_an_empty_handed_transfer_is_served_though_all_memory_is_stuck(monkeypatch):
    monkeypatch.setattr(_pool, "GRACE", 0.4)
    budget = Budget(10)
    budget.acquire(10, empty_handed=True, check=nothing)
    budget.acquire(4, empty_handed=True, check=nothing)
    assert budget.used == 14
    checks = iter([None, None, None, None])

    def check():
        if next(checks, "stop"):
            raise Cancelled("it waits, as it should")

    with pytest.raises(Cancelled):
        budget.acquire(4, empty_handed=False, check=check)
    assert budget.used == 14


def test_share_holds_no_more_than_its_limit_and_gives_all_back():
    budget = Budget(100)
    share = Share(budget, 10)
    share.acquire(8, nothing)
    assert not share.try_acquire(4)
    freed = threading.Timer(0.05, share.release, [8])
    freed.start()
    share.acquire(4, nothing)
    freed.join()
    assert budget.used == 4
    share.close()
    assert budget.used == 0


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_a_lane_of_one_keeps_order(pool):
    lane = Lane(pool, 1)
    seen = []
    for number in range(200):
        lane.submit(lambda number=number: seen.append(number), nothing)
    lane.wait()
    assert seen == list(range(200))


def test_a_lane_runs_at_most_its_width(pool):
    lane = Lane(pool, 3)
    lock = threading.Lock()
    running = peak = 0

    def job():
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    for _ in range(40):
        lane.submit(job, nothing)
    lane.wait()
    assert 2 <= peak <= 3


def test_a_lane_drops_what_comes_after_an_error_but_calls_done(pool):
    lane = Lane(pool, 1)
    done = []
    ran = []

    def fail():
        raise ValueError("first")

    lane.submit(fail, lambda: done.append(0))
    for number in range(1, 5):
        lane.submit(lambda number=number: ran.append(number), lambda number=number: done.append(number))
    lane.wait()
    assert isinstance(lane.error, ValueError)
    assert ran == []
    assert sorted(done) == [0, 1, 2, 3, 4]


def test_drop_waits_for_what_runs(pool):
    lane = Lane(pool, 1)
    begun, go = threading.Event(), threading.Event()
    finished = []

    def job():
        begun.set()
        go.wait(5)
        finished.append(1)

    lane.submit(job, nothing)
    lane.submit(lambda: finished.append(2), nothing)
    begun.wait(5)
    threading.Timer(0.05, go.set).start()
    lane.drop()
    assert finished == [1]


def test_a_lane_on_a_closed_pool_fails_and_releases():
    pool = ThreadPoolExecutor(1)
    lane = Lane(pool, 1)
    pool.shutdown()
    done = []
    lane.submit(nothing, lambda: done.append(1))
    lane.wait()
    assert isinstance(lane.error, StoreError)
    assert done == [1]


def test_lanes_share_a_pool_fairly():
    with ThreadPoolExecutor(1) as pool:
        order = []
        go = threading.Event()
        first, second = Lane(pool, 1), Lane(pool, 1)
        first.submit(lambda: go.wait(5), nothing)
        for number in range(5):
            first.submit(lambda number=number: order.append(("first", number)), nothing)
            second.submit(lambda number=number: order.append(("second", number)), nothing)
        go.set()
        first.wait()
        second.wait()
    assert [name for name, _ in order[:4]] == ["second", "first", "second", "first"]


EVENT = {"store": "s", "driver": "d", "operation": "add", "image_id": "i", "transfer": "t", "time": 0.0, "size": 1}


def test_events_come_in_order_and_a_failing_observer_breaks_nothing():
    engine = Engine(Limits())
    seen = []

    def observer(event):
        seen.append(event.size)
        if event.size == 1:
            raise RuntimeError("observer broke")

    for size in range(5):
        engine.observe(observer, TransferStarted(**{**EVENT, "size": size}))
    engine.close()
    assert seen == [0, 1, 2, 3, 4]


def test_a_hanging_observer_costs_events_not_time(monkeypatch):
    monkeypatch.setattr(_pool, "EVENTS_MAX", 3)
    monkeypatch.setattr(_pool, "FLUSH", 0.05)
    engine = Engine(Limits())
    go = threading.Event()
    began = time.monotonic()
    for _ in range(100):
        engine.observe(lambda event: go.wait(5), TransferStarted(**EVENT))
    engine.close()
    assert time.monotonic() - began < 2
    go.set()
