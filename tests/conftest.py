"""For all tests: neither a busy machine nor a run in the background makes one fail."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

# A shell starts what runs in its background deaf to Ctrl-C, and the programs that tests start would be deaf as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
