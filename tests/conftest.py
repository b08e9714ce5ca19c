"""For all tests: neither a busy machine nor a run in the background makes one fail."""

from __future__ import annotations

import atexit
import signal

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

# What runs in the background of a shell, or under nohup, may be deaf to signals, and programs that tests start as well.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the servers at the end of a worker of pytest-xdist too, which ends without its exit handlers."""
    if hasattr(session.config, "workerinput"):
        atexit._run_exitfuncs()
