"""The kit's own machinery: fault plans, reports, test classes, plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import unittest
from pathlib import Path
from typing import Any

import pytest

import imagestore.testing
from imagestore import Retry, Store
from imagestore.driver import Block, Capabilities, Driver, Hints, Options
from imagestore.drivers.memory import Backend, MemoryDriver
from imagestore.errors import Unavailable
from imagestore.testing import (
    Check,
    DriverConformance,
    Faults,
    FaultyDriver,
    Harness,
    Killed,
    Kit,
    NotApplicable,
    checks,
    run,
    run_check,
)
from imagestore.testing._data import CountingSource, chunks, pattern, pipe_of
from imagestore.testing._kit import Rendezvous, Task, block_size, raises

QUICK = Retry(attempts=3, first=0.001, longest=0.001)


class MemoryHarness(Harness):
    def __init__(self, personality: str = "plain") -> None:
        self.backend = Backend()
        self.personality = personality
        self.closed = 0

    def make_driver(self) -> Driver:
        values = {option.dest: option.default for option in MemoryDriver.options}
        settings = Options({**values, "personality": self.personality, "block_size": 65536})
        return MemoryDriver(settings, store="kit", backend=self.backend)

    def make_unreachable(self) -> None:
        return None

    def close(self) -> None:
        self.closed += 1


def faulty(plan: Faults, **changes: Any) -> FaultyDriver:
    return FaultyDriver(MemoryHarness().make_driver(), plan, changes)


# FaultyDriver


def test_faulty_driver_has_the_verbs_of_its_driver() -> None:
    driver = faulty(Faults())
    inner = driver._driver
    store = Store(driver)
    for verb in (
        "locate",
        "create",
        "delete",
        "uploads",
        "discard",
        "list",
        "usage",
        "extents",
        "copy",
        "sign",
        "bind",
    ):
        assert hasattr(driver, verb) == hasattr(inner, verb), verb
        assert store.supports(verb) == hasattr(inner, verb), verb
    assert driver.name == "memory"
    assert driver.schemes == ("memory",)
    assert driver.options == inner.options
    assert not hasattr(driver, "capabilities")


def test_faulty_driver_does_nothing_without_a_plan() -> None:
    plan = Faults()
    with Store(faulty(plan)) as store:
        result = store.add("a", b"data")
        assert store.get(result.location).read() == b"data"
        assert [image.image_id for image in store.list()] == ["a"]
        store.delete(result.location)
    names = [call.operation for call in plan.log]
    assert names[:3] == ["open", "locate", "create"]
    assert plan.calls["write"] == 1
    assert plan.calls["commit"] == 1
    assert plan.calls["delete"] == 1


def test_capabilities_can_be_changed() -> None:
    with Store(faulty(Faults(), blocks_max=3, collision="last-wins")) as store:
        assert store.capabilities.blocks_max == 3
        assert store.capabilities.collision == "last-wins"


def test_fail_counts_calls() -> None:
    plan = Faults()
    plan.fail("usage", Unavailable, at=2, times=2)
    driver: Any = faulty(plan)
    driver.open()
    driver.usage()
    for _ in range(2):
        with pytest.raises(Unavailable):
            driver.usage()
    driver.usage()
    assert plan.calls["usage"] == 4


def test_fail_after_the_effect() -> None:
    plan = Faults()
    plan.fail("delete", Unavailable("lost"), after=True)
    driver: Any = faulty(plan)
    with Store(driver) as store:
        store.add("a", b"data")
        with pytest.raises(Unavailable, match="lost"):
            driver.delete(driver.locate("a"))
        assert not store.exists("a")


def test_an_error_given_as_instance_is_made_anew() -> None:
    plan = Faults()
    error = Unavailable("gone")
    plan.fail("locate", error, times=None)
    with Store(faulty(plan), retry=QUICK) as store:
        with pytest.raises(Unavailable, match="gone") as first:
            store.exists("a")
        with pytest.raises(Unavailable, match="gone") as second:
            store.exists("a")
    assert first.value is not second.value
    assert error.store is None


def test_cut_with_error_and_silently() -> None:
    data = pattern(300_000)
    plan = Faults()
    driver: Any = faulty(plan)
    with Store(driver) as store:
        place = store.add("a", data).location
        plan.cut(100, Unavailable)
        reading = driver.read(place, 0, None)
        assert next(reading.chunks) == data[:100]
        with pytest.raises(Unavailable):
            next(reading.chunks)
        plan.cut(200, None)
        assert b"".join(driver.read(place, 0, None).chunks) == data[:200]
        assert b"".join(driver.read(place, 0, None).chunks) == data


def test_die_lets_nothing_through() -> None:
    plan = Faults()
    driver: Any = faulty(plan)
    driver.open()
    plan.die(len(plan.log) + 3, after=True)
    upload = driver.create("a", Hints(token="0" * 32))
    upload.write(Block(index=0, offset=0, data=b"x", last=True))
    with pytest.raises(Killed):
        upload.commit(1)
    for call in (upload.abort, lambda: driver.locate("a"), driver.usage):
        with pytest.raises(Killed):
            call()
    assert driver._driver.locate("a") is not None
    plan.bury()


def test_bury_gives_up_what_the_dead_held() -> None:
    plan = Faults()
    driver: Any = faulty(plan)
    driver.open()
    driver.create("a", Hints(token="0" * 32))
    plan.die(len(plan.log) + 1)
    with pytest.raises(Killed):
        driver.usage()
    inner = driver._driver
    assert list(inner.uploads())
    looker = inner.clone()
    looker.open()
    plan.bury()
    assert not list(looker.uploads())


def test_clone_and_heal_share_the_plan() -> None:
    plan = Faults()
    plan.fail("open", Unavailable, times=None)
    clone = faulty(plan).clone()
    with pytest.raises(Unavailable):
        clone.open()
    plan.heal()
    clone.open()
    assert plan.calls["open"] == 2


def test_on_runs_in_the_calls_thread() -> None:
    plan = Faults()
    seen: list[tuple[str, int, threading.Thread]] = []
    plan.on("usage", lambda call: seen.append((call.operation, call.number, threading.current_thread())), times=None)
    driver: Any = faulty(plan)
    driver.open()
    driver.usage()
    driver.usage()
    assert seen == [("usage", 1, threading.current_thread()), ("usage", 2, threading.current_thread())]


# Data


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 65536, 70_000, 1 << 20])
def test_pattern(size: int) -> None:
    data = pattern(size, "seed")
    assert len(data) == size
    assert data == pattern(size, "seed")
    assert bytes(8) not in data
    units = [data[at : at + 4096] for at in range(0, size - 4095, 4096)]
    assert len(set(units)) == len(units)
    assert size == 0 or data != pattern(size, "other")


def test_sources() -> None:
    data = pattern(100_000)
    hits: list[int] = []
    source = CountingSource(data, at={10: lambda: hits.append(source.taken), 50_000: lambda: hits.append(source.taken)})
    got = b""
    while part := source.read(30_000):
        got += part
    assert got == data
    assert hits == [10, 50_000]
    assert b"".join(chunks(data, 7)) == data
    with pipe_of(data) as descriptor, open(descriptor, "rb", closefd=False) as file:
        assert file.read() == data
    with pipe_of(data) as descriptor:
        os.read(descriptor, 10)


def test_block_size_keeps_the_limits() -> None:
    assert block_size(Capabilities()) == 65536
    assert block_size(Capabilities(block_min=5 << 20)) == 5 << 20
    assert block_size(Capabilities(sparse_unit=4 << 20)) == 4 << 20
    assert block_size(Capabilities(block_max=1000)) == 1000


# Running


def test_run_reports_and_closes() -> None:
    harness = MemoryHarness()
    report = run(harness, parts=["locations"])
    assert report.ok, report
    report.require()
    assert harness.closed == 1
    assert {outcome.check.part for outcome in report.outcomes} == {"locations"}
    text = str(report)
    assert "passed          locations.round_trip" in text
    assert "not applicable  locations.hostile: the harness has no hostile_locations()" in text
    assert text.endswith("1 not applicable")


def test_run_tells_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryDriver, "parse", lambda self, uri: 1 / 0)
    report = run(MemoryHarness(), parts=["locations"])
    assert not report.ok
    with pytest.raises(AssertionError, match=r"locations\.round_trip: A canonical location stays what it is"):
        report.require()


def test_a_report_without_passes_is_not_ok() -> None:
    assert not run(MemoryHarness(), parts=[]).ok


def test_not_applicable_has_the_reason() -> None:
    by_id = {check.id: check for check in checks()}
    for name, reason in {
        "contract.two_auths": "has no auths",
        "contract.blocks_in_order": "may be parallel",
        "contract.unreachable": "can't be unreachable",
        "leftovers.process_killed": "no other process",
        "leftovers.foreign_objects": "plant_foreign",
    }.items():
        harness = MemoryHarness("cinder") if name == "contract.two_auths" else MemoryHarness()
        with pytest.raises(NotApplicable, match=reason):
            run_check(by_id[name], harness)


def test_every_check_says_what_it_is_about() -> None:
    assert [check.id for check in checks() if not check.summary] == []
    assert len({check.id for check in checks()}) == len(checks()) > 90
    assert checks("faults") == tuple(check for check in checks() if check.part == "faults")


def test_a_failed_check_leaves_nothing() -> None:
    harness = MemoryHarness()

    def fails(kit: Kit) -> None:
        kit.add(kit.new_id(), b"data")
        plan = kit.faults()
        plan.die(6)
        kit.add_mortally(kit.new_id(), kit.data(), plan)
        assert kit.leftovers()
        raise AssertionError("on purpose")

    with pytest.raises(AssertionError, match="on purpose"):
        run_check(Check(part="contract", name="fails", function=fails), harness)
    assert not harness.backend.inventory()


def test_harness_without_hooks() -> None:
    harness = MemoryHarness()
    for hook in (harness.plant_foreign, harness.auths, harness.hostile_locations):
        with pytest.raises(NotApplicable, match="the harness has no"):
            hook()
    with pytest.raises(NotApplicable):
        harness.hold("x")
    with pytest.raises(NotApplicable):
        harness.plant(b"")
    with harness.canary():
        pass


class ReadOnlyDriver(FaultyDriver):
    """A memory driver that can only be read."""

    name = "memory"
    schemes = ("memory",)

    def clone(self) -> Driver:
        return ReadOnlyDriver(self._driver.clone(), Faults())

    def __getattr__(self, name: str) -> Any:
        if name in ("create", "delete", "locate", "uploads", "discard", "list", "usage"):
            raise AttributeError(name)
        return super().__getattr__(name)


class ReadOnlyHarness(MemoryHarness):
    def make_driver(self) -> Driver:
        return ReadOnlyDriver(super().make_driver(), Faults())

    def plant(self, data: bytes) -> str:
        with Store(super().make_driver()) as store:
            return store.add(f"planted-{len(self.backend.inventory())}", data).location.uri


def test_a_driver_that_only_reads() -> None:
    report = run(ReadOnlyHarness())
    report.require()
    passed = {outcome.check.id for outcome in report.of("passed")}
    assert {"contract.ranges", "faults.read_resumed", "locations.mutated", "discipline.many_reading_threads"} <= passed
    assert "contract.name_taken" not in passed


# Helpers


def test_raises() -> None:
    with raises(KeyError) as caught:
        os.environ["IMAGESTORE_NOT_THERE"]
    assert isinstance(caught[0], KeyError)
    with pytest.raises(AssertionError, match="did not raise KeyError"), raises(KeyError):
        pass
    with pytest.raises(AssertionError, match="raised Unavailable instead of KeyError"), raises(KeyError):
        raise Unavailable
    with pytest.raises(ZeroDivisionError), raises(KeyError):
        1 / 0  # noqa: B018


def test_rendezvous_and_task() -> None:
    gate = Rendezvous(3)
    tasks = [Task(gate.arrive), Task(gate.arrive), Task(gate.leave)]
    for task in tasks:
        assert task.wait() is None
    with pytest.raises(ZeroDivisionError):
        Task(lambda: 1 / 0).result()
    assert Task(lambda: 5).result() == 5


# Test classes


def test_a_test_class_for_unittest() -> None:
    class TestMemory(DriverConformance, unittest.TestCase):
        harness = MemoryHarness
        parts = ("locations",)

    suite = unittest.defaultTestLoader.loadTestsFromTestCase(TestMemory)
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun == len(checks())
    assert result.wasSuccessful(), result.errors + result.failures
    reasons = {reason for _, reason in result.skipped}
    assert "this class leaves out the part faults" in reasons
    assert "the harness has no hostile_locations()" in reasons
    assert TestMemory._harness is None


def test_a_test_class_has_a_method_for_each_check() -> None:
    for check in checks():
        method = getattr(DriverConformance, f"test_{check.part}_{check.name}")
        assert method.__doc__ == check.summary


PLUGIN_TEST = """
import sys
sys.path.insert(0, {tests!r})
from test_testing_kit import MemoryHarness
from imagestore.testing import DriverConformance

class TestMemory(DriverConformance):
    harness = MemoryHarness

def test_other():
    pass
"""


def _pytest(directory: Path, *arguments: str) -> str:
    root = Path(imagestore.testing.__file__).parents[2]
    environment = dict(os.environ, PYTHONPATH=str(root), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    command = [sys.executable, "-m", "pytest", "-p", "imagestore.testing.plugin", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_plugin(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(PLUGIN_TEST.format(tests=str(Path(__file__).parent)))
    told = _pytest(tmp_path, "--conformance", "locations", "--conformance", "contract.verbs")
    count = len(checks("locations"))
    assert f"test_it.py::TestMemory: {count} passed, 1 not applicable" in told
    assert "the harness has no hostile_locations(): locations.hostile" in told
    assert "1 skipped" in told
    assert "deselected" in told
    assert "imagestore conformance" not in _pytest(tmp_path, "-k", "test_other")


def test_imports_no_test_framework() -> None:
    code = (
        "import sys, imagestore.testing as t\n"
        "import imagestore.testing.plugin\n"
        "print('imagestore._store' in sys.modules)\n"
        "t.DriverConformance, t.run\n"
        "print([name for name in ('pytest', '_pytest', 'hypothesis', 'oslo_config') if name in sys.modules])\n"
    )
    root = Path(imagestore.testing.__file__).parents[2]
    environment = dict(os.environ, PYTHONPATH=str(root))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["False", "[]"], done.stdout + done.stderr


def test_names() -> None:
    for name in imagestore.testing.__all__:
        assert getattr(imagestore.testing, name) is not None
    assert set(imagestore.testing.__all__) <= set(dir(imagestore.testing))
    with pytest.raises(AttributeError):
        imagestore.testing.nothing_like_this  # noqa: B018
