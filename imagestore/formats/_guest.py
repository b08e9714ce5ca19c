"""The first sector of the disk that a guest sees."""

from __future__ import annotations

from imagestore.formats._findings import Report
from imagestore.formats._probe import probe

__all__ = ["check_guest"]


def check_guest(sector: bytes | None, offset: int, report: Report) -> None:
    """Refuse an image whose guest disk is an image again: converted to raw and probed, it would be obeyed."""
    found = probe(sector) if sector else set()
    if found:
        report("guest.image", f"the guest's disk begins as {', '.join(sorted(found))}", offset)
