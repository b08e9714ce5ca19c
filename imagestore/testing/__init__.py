"""The tester's door: proves that a driver keeps the contract, and makes drivers fail on purpose.

A driver's author writes a `Harness`, three functions that tell how to make the driver, and runs the kit::

    from imagestore.testing import DriverConformance, Harness

    class MyHarness(Harness):
        def make_driver(self): ...
        def make_unreachable(self): ...
        def close(self): ...

    class TestMyDriver(DriverConformance):
        harness = MyHarness

pytest then has one test for each check (`DriverConformance`); without any framework, ``run(MyHarness())`` gives a
`Report`. Checks are chosen by the verbs and `Capabilities` of the driver; one that means nothing for it raises
`NotApplicable` with the reason, which test frameworks show as a skip.

`FaultyDriver` with a plan of `Faults` wraps any driver, also in the tests of applications that use imagestore::

    faults = Faults()
    faults.fail("write", Unavailable, at=2, times=3)
    store = Store(FaultyDriver(driver, faults))

Nothing here needs a test framework but `imagestore.testing.plugin`, which pytest loads by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagestore.testing._faulty import Call, Faults, FaultyDriver, Killed
    from imagestore.testing._harness import Harness, NotApplicable
    from imagestore.testing._kit import Kit, Profile
    from imagestore.testing._registry import Check
    from imagestore.testing._run import DriverConformance, Outcome, Report, checks, run, run_check

__all__ = [
    "Call",
    "Check",
    "DriverConformance",
    "Faults",
    "FaultyDriver",
    "Harness",
    "Killed",
    "Kit",
    "NotApplicable",
    "Outcome",
    "Profile",
    "Report",
    "checks",
    "run",
    "run_check",
]

# Looked up when first used: pytest loads the plugin in every run on this Python, and must not load the kit with it.
_HOMES = {
    "_faulty": ("Call", "Faults", "FaultyDriver", "Killed"),
    "_harness": ("Harness", "NotApplicable"),
    "_kit": ("Kit", "Profile"),
    "_registry": ("Check",),
    "_run": ("DriverConformance", "Outcome", "Report", "checks", "run", "run_check"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
