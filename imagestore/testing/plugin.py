"""The pytest plugin: chooses checks on the command line, and says at the end what a driver did not have to prove.

pytest finds it by its entry point. ``--conformance leftovers`` runs the checks of one part only (and no other
tests); may be given several times, also with whole names such as ``contract.racing_adders``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imagestore.testing._registry import PARTS

if TYPE_CHECKING:
    import pytest

    from imagestore.testing._registry import Check


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("imagestore").addoption(
        "--conformance",
        action="append",
        default=[],
        metavar="PART",
        help=f"run only these checks of the imagestore conformance kit: {', '.join(PARTS)}, or the name of one",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = set(config.getoption("conformance"))
    if not wanted:
        return
    kept = [item for item in items if (check := _check(item)) is not None and wanted & {check.part, check.id}]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    check = _check(item)
    if check is not None and call.when == "call":
        reason = str(call.excinfo.value) if call.excinfo is not None else ""
        # Reports go from workers of pytest-xdist to the terminal with these properties.
        item.user_properties.append(("imagestore_check", f"{check.id}\n{reason}"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped: dict[str, dict[str, list[str]]] = {}
    passed: dict[str, int] = {}
    for outcome in ("passed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            found = dict(getattr(report, "user_properties", [])).get("imagestore_check")
            if found is None:
                continue
            suite = report.nodeid.rpartition("::")[0]
            name, _, reason = found.partition("\n")
            if outcome == "passed":
                passed[suite] = passed.get(suite, 0) + 1
            else:
                skipped.setdefault(suite, {}).setdefault(reason, []).append(name)
    if not passed and not skipped:
        return
    terminalreporter.section("imagestore conformance")
    for suite in sorted({*passed, *skipped}):
        reasons = skipped.get(suite, {})
        count = sum(len(names) for names in reasons.values())
        terminalreporter.write_line(f"{suite}: {passed.get(suite, 0)} passed, {count} not applicable")
        for reason, names in sorted(reasons.items()):
            terminalreporter.write_line(f"    {reason}: {', '.join(names)}")


def _check(item: pytest.Item) -> Check | None:
    return getattr(getattr(item, "function", None), "imagestore_check", None)
