"""Running checks: all at once with a report, or one by one in a test class."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from imagestore.testing import contract, discipline, faults, leftovers, locations
from imagestore.testing._harness import Harness, NotApplicable
from imagestore.testing._kit import Kit, Profile, probe
from imagestore.testing._registry import Check, registered

__all__ = ["DriverConformance", "Outcome", "Report", "checks", "run", "run_check"]

# Imported for their checks, which register themselves.
_PARTS = (contract, faults, leftovers, discipline, locations)


def checks(part: str | None = None) -> tuple[Check, ...]:
    """All checks of the kit, or those of one part."""
    return registered(part)


def run_check(check: Check, harness: Harness, profile: Profile | None = None) -> None:
    """Run one check. Raises AssertionError, or `NotApplicable` with the reason."""
    profile = profile or probe(harness)
    reason = check.not_applicable(profile.verbs, profile.capabilities)
    if reason is not None:
        raise NotApplicable(reason)
    kit = Kit(harness, profile)
    try:
        kit.start()
        check.function(kit)
    finally:
        kit.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one check went; `text` is the reason or the traceback."""

    check: Check
    status: Literal["passed", "failed", "not applicable"]
    seconds: float
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """How a driver did. ``str()`` is a table."""

    driver: str
    outcomes: tuple[Outcome, ...]

    def of(self, status: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == status]

    @property
    def ok(self) -> bool:
        """At least one check passed and none failed."""
        return bool(self.of("passed")) and not self.of("failed")

    def __str__(self) -> str:
        lines = []
        for outcome in self.outcomes:
            line = f"{outcome.status:14}  {outcome.check.id}"
            lines.append(f"{line}: {outcome.text}" if outcome.status == "not applicable" else line)
        lines += [f"\n{outcome.check.id}: {outcome.check.summary}\n{outcome.text}" for outcome in self.of("failed")]
        counts = ", ".join(f"{len(self.of(status))} {status}" for status in ("passed", "failed", "not applicable"))
        lines.append(f"{self.driver}: {counts}")
        return "\n".join(lines)

    def require(self) -> None:
        """Raise AssertionError with the whole report if anything failed."""
        if not self.ok:
            raise AssertionError(f"\n{self}")


def run(harness: Harness, *, parts: Iterable[str] | None = None) -> Report:
    """Run all checks (of ``parts``) and close the harness."""
    wanted = None if parts is None else set(parts)
    outcomes = []
    try:
        profile = probe(harness)
        for check in registered():
            if wanted is not None and check.part not in wanted:
                continue
            began = time.monotonic()
            status: Literal["passed", "failed", "not applicable"] = "passed"
            text = ""
            try:
                run_check(check, harness, profile)
            except NotApplicable as error:
                status, text = "not applicable", str(error)
            except Exception:  # noqa: BLE001 - whatever a check raises is its outcome
                status, text = "failed", traceback.format_exc()
            outcomes.append(Outcome(check=check, status=status, seconds=time.monotonic() - began, text=text))
    finally:
        harness.close()
    return Report(driver=profile.driver, outcomes=tuple(outcomes))


class DriverConformance:
    """A mix-in for test classes, with one test method for each check, such as ``test_contract_empty_image``.

    ::

        class TestMyDriver(DriverConformance):
            harness = MyHarness

    pytest collects such a class as it is; for unittest add ``unittest.TestCase`` as a second base. The harness is
    made once for the class. Override `make_harness` where it needs arguments, and `parts` to leave parts out.
    """

    harness: ClassVar[Callable[[], Harness]]
    parts: ClassVar[tuple[str, ...]] = ("contract", "faults", "leftovers", "discipline", "locations")

    _harness: ClassVar[Harness | None] = None
    _profile: ClassVar[Profile | None] = None

    @classmethod
    def make_harness(cls) -> Harness:
        """The harness of this class: by default ``cls.harness()``."""
        return cls.__dict__["harness"]() if "harness" in cls.__dict__ else cls.harness()

    @classmethod
    def setup_class(cls) -> None:
        # pytest calls this for a plain class, unittest setUpClass, and pytest both for a TestCase.
        if cls._harness is None:
            cls._harness = cls.make_harness()
            cls._profile = probe(cls._harness)

    @classmethod
    def teardown_class(cls) -> None:
        harness, cls._harness = cls._harness, None
        if harness is not None:
            harness.close()

    setUpClass = setup_class
    tearDownClass = teardown_class

    def _conformance(self, check: Check) -> None:
        if check.part not in self.parts:
            raise NotApplicable(f"this class leaves out the part {check.part}")
        assert self._harness is not None, "setup_class was not called"
        run_check(check, self._harness, self._profile)


def _method(check: Check) -> Callable[[DriverConformance], None]:
    def test(self: DriverConformance) -> None:
        self._conformance(check)

    test.__doc__ = check.summary
    test.__name__ = f"test_{check.part}_{check.name}"
    test.__qualname__ = f"DriverConformance.{test.__name__}"
    conformance_check: Any = test
    conformance_check.imagestore_check = check
    return test


for _check in registered():
    setattr(DriverConformance, f"test_{_check.part}_{_check.name}", _method(_check))
