"""Headers of HTTP that say when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from imagestore.driver import http_date, retry_after

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("Wed, 01 Jul 2026 12:00:00 GMT", NOON),
        ("Wed, 01 Jul 2026 12:00:00 -0000", NOON),  # a zone that says that it is none
        ("Wed, 01 Jul 2026 14:00:00 +0200", NOON.astimezone(timezone(timedelta(hours=2)))),
        ("Wednesday, 01-Jul-26 12:00:00 GMT", NOON),
        ("Wed Jul  1 12:00:00 2026", NOON),
    ],
)
def test_dates(text: str, moment: datetime) -> None:
    found = http_date(text)
    assert found == moment
    assert found is not None
    assert found.tzinfo is not None


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "soon",
        "0",
        "Wed, 99 Jul 2026 12:00:00 GMT",
        "Wed, 01 Jul 99999999999999999999 12:00:00 GMT",
        "Wed, 01 Jul 2026 12:00:00 +99999999",
        "\x00",
        ", , ,",
    ],
)
def test_what_is_no_date(text: str | None) -> None:
    assert http_date(text) is None


@pytest.mark.parametrize(
    ("text", "date", "seconds"),
    [
        ("7", None, 7.0),
        (" 7 ", None, 7.0),
        ("0", None, 0.0),
        ("Wed, 01 Jul 2026 12:00:30 GMT", "Wed, 01 Jul 2026 12:00:00 GMT", 30.0),
        ("Wed, 01 Jul 2026 11:59:30 GMT", "Wed, 01 Jul 2026 12:00:00 GMT", 0.0),
        ("Wed, 01 Jul 2015 12:00:00 GMT", None, 0.0),
        ("Wed, 01 Jul 2015 12:00:00 GMT", "nonsense", 0.0),
        ("soon", None, None),
        ("-1", None, None),
        ("1.5", None, None),
        ("1" * 400, None, None),
        ("\u00b2", None, None),  # a digit, and no number
        ("", None, None),
        (None, None, None),
    ],
)
def test_how_long_to_wait(text: str | None, date: str | None, seconds: float | None) -> None:
    assert retry_after(text, date) == seconds


def test_a_date_seen_from_our_own_clock() -> None:
    wait = retry_after(format_datetime(datetime.now(UTC) + timedelta(hours=9), usegmt=True))
    assert wait is not None
    assert 8 * 3600 < wait <= 9 * 3600
