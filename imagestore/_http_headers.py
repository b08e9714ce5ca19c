"""What some headers of HTTP say, for all drivers that speak it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

__all__ = ["http_date", "retry_after"]

_SECONDS: Final = re.compile(r"[0-9]{1,18}")


def http_date(text: str | None) -> datetime | None:
    """A date as HTTP writes it (RFC 9110, 5.6.7), with its zone; None for what is none."""
    try:
        found = parsedate_to_datetime(text or "")
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def retry_after(text: str | None, date: str | None = None) -> float | None:
    """Seconds to wait by a ``Retry-After`` (RFC 9110, 10.2.3); None if it says nothing.

    One that is a date is seen from the server's own clock, if its answer's ``Date`` is given.
    """
    text = (text or "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    until = http_date(text)
    if until is None:
        return None
    return max(0.0, (until - (http_date(date) or datetime.now(UTC))).total_seconds())
