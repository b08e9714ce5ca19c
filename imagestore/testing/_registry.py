"""The list of checks. A check is a function that takes a `Kit` and asserts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from imagestore.driver import Capabilities
    from imagestore.testing._kit import Kit

__all__ = ["PARTS", "Check", "check", "registered", "variants"]

PARTS: Final = ("contract", "faults", "leftovers", "discipline", "locations")

CheckFunction: TypeAlias = "Callable[[Kit], None]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check of the kit.

    Attributes:
        part: one of the five parts.
        name: unique within the part.
        function: takes a `Kit`; raises AssertionError, or `NotApplicable`.
        needs: verbs that the driver must have.
        when, reason: applies only if ``when(capabilities)``; if not, ``reason`` says why.
    """

    part: str
    name: str
    function: CheckFunction
    needs: tuple[str, ...] = ()
    when: Callable[[Capabilities], bool] | None = None
    reason: str = ""

    @property
    def id(self) -> str:
        return f"{self.part}.{self.name}"

    @property
    def summary(self) -> str:
        """The first line of what the check says of itself."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    def not_applicable(self, verbs: frozenset[str], capabilities: Capabilities) -> str | None:
        """Why the check means nothing for such a driver, or None."""
        missing = [verb for verb in self.needs if verb not in verbs]
        if missing:
            return f"the driver has no {' or '.join(missing)}"
        if self.when is not None and not self.when(capabilities):
            return self.reason
        return None


_checks: dict[str, Check] = {}


def check(
    part: str,
    *needs: str,
    name: str = "",
    when: Callable[[Capabilities], bool] | None = None,
    reason: str = "",
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a function as a check of ``part`` which needs these verbs."""

    def register(function: CheckFunction) -> CheckFunction:
        label = name or str(getattr(function, "__name__", ""))
        made = Check(part=part, name=label, function=function, needs=needs, when=when, reason=reason)
        if part not in PARTS or made.id in _checks:
            raise ValueError(f"{made.id}: no such part, or twice")
        _checks[made.id] = made
        return function

    return register


def variants(
    part: str,
    *needs: str,
    when: Callable[[Capabilities], bool] | None = None,
    reason: str = "",
    **values: object,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function with a second argument as one check for each of ``values``, named after it."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for label, value in values.items():
            name = f"{function.__name__}_{label}"
            check(part, *needs, name=name, when=when, reason=reason)(_with(function, value))
        return function

    return register


def _with(function: Callable[..., None], value: object) -> CheckFunction:
    def run(kit: Kit) -> None:
        function(kit, value)

    run.__doc__ = function.__doc__
    return run


def registered(part: str | None = None) -> tuple[Check, ...]:
    """All checks (of one part), in the order of the parts."""
    found = [item for item in _checks.values() if part in (None, item.part)]
    return tuple(sorted(found, key=lambda item: PARTS.index(item.part)))
