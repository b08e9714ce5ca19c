"""LUKS 1 (On-Disk Format 1.2.3) and LUKS 2 (LUKS2 On-Disk Format). A key is never needed, and never taken."""

from __future__ import annotations

import hashlib
import re
import struct
from itertools import pairwise
from typing import Final

from imagestore.formats._findings import Broken, Report
from imagestore.formats._json import JsonError, load
from imagestore.formats._window import View

__all__ = ["parse_luks"]

_ITERATIONS: Final = 10**8
_WORD: Final = re.compile(rb"[a-z0-9:_-]+\0*", re.IGNORECASE)
_HASHES: Final = frozenset({b"sha1", b"sha224", b"sha256", b"sha384", b"sha512", b"ripemd160", b"whirlpool"})
_ACTIVE, _DISABLED = 0x00AC71F3, 0x0000DEAD


def parse_luks(view: View, report: Report) -> None:
    """Either version."""
    report("luks.encrypted", "the contents are encrypted", 0)
    head = view.head
    version = int.from_bytes(head[6:8], "big")
    if version == 1:
        _version_1(view, report)
    elif version == 2:
        _version_2(view, report)
    else:
        raise Broken("luks.version", f"version {version}", 6)


def _version_1(view: View, report: Report) -> None:
    head = view.head
    if len(head) < 592:
        raise Broken("luks.header", f"the image ends inside the header, after {len(head)} bytes", len(head))
    for offset in (8, 40, 72):
        report.check(_WORD.fullmatch(head[offset : offset + 32]) is not None, "luks.cipher", "not a name", offset)
    report.check(head[72:104].rstrip(b"\0").lower() in _HASHES, "luks.cipher", "a hash that is not known", 72)
    payload, key = struct.unpack_from(">II", head, 104)
    (iterations,) = struct.unpack_from(">I", head, 164)
    if payload < 2:
        report("luks.detached", f"the payload is at sector {payload}", 104)
        return
    report.check(payload >= 8 and not view.beyond(payload * 512), "luks.header", f"payload at sector {payload}", 104)
    report.check(key in {16, 24, 32, 48, 64}, "luks.header", f"a key of {key} bytes", 108)
    report.check(0 < iterations <= _ITERATIONS, "luks.iterations", f"{iterations} iterations of the master key", 164)
    if view.total is not None:
        report.sizes.append(("luks payload", max(view.total - payload * 512, 0)))
    taken = []
    for slot in range(8):
        at = 208 + 48 * slot
        state, rounds = struct.unpack_from(">II", head, at)
        start, stripes = struct.unpack_from(">II", head, at + 40)
        report.check(state in {_ACTIVE, _DISABLED}, "luks.keyslot", f"slot {slot} has the state {state:#x}", at)
        report.check(stripes == 4000, "luks.keyslot", f"slot {slot} has {stripes} stripes", at + 44)
        if state == _ACTIVE:
            good = 0 < rounds <= _ITERATIONS
            report.check(good, "luks.iterations", f"{rounds} iterations in slot {slot}", at + 4)
        stop = start + -(-key * stripes // 512)
        report.check(start >= 2 and stop <= payload, "luks.keyslot", f"slot {slot} is misplaced", at + 40)
        taken.append((start, stop))
    taken.sort()
    apart = all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    report.check(apart, "luks.keyslot", "two key slots overlap", 208)


def _number(value: object) -> int:
    """A number, which LUKS2 writes as text where it may be large. Raises ValueError."""
    if not isinstance(value, int | str) or not (text := str(value)).isascii() or not text.isdigit() or len(text) > 20:
        raise ValueError("no number")
    return int(text)


def _version_2(view: View, report: Report) -> None:
    head = view.head
    if len(head) < 4096:
        raise Broken("luks.header", f"the image ends inside the header, after {len(head)} bytes", len(head))
    size, sequence = struct.unpack_from(">QQ", head, 8)
    own, power = int.from_bytes(head[256:264], "big"), size & (size - 1) == 0
    if not (power and 16 << 10 <= size <= 4 << 20) or own or view.beyond(0, 2 * size):
        raise Broken("luks.header", f"a header of {size} bytes at {own}", 8)
    first = view.at(0, size) if size <= 1 << 20 else None
    second = view.at(size, 4096)
    if first is None:
        if view.total is not None:
            report("luks.unverified", f"the header has {size} bytes", 8)
            report.verified = "head"
            report.sizes.append(("luks stream", view.total))
        return
    algorithm = first[72:104].rstrip(b"\0").decode("latin-1")
    if algorithm not in {"sha256", "sha512", "sha1"}:
        raise Broken("luks.cipher", "a checksum that is not known", 72)
    digest = hashlib.new(algorithm, first[:448] + bytes(64) + first[512:], usedforsecurity=False).digest()
    report.check(first[448:512].startswith(digest), "luks.header", "the header's checksum is wrong", 448)
    if second is not None:
        good = second[:6] == b"SKUL\xba\xbe" and struct.unpack_from(">HQQ", second, 6) == (2, size, sequence)
        good &= int.from_bytes(second[256:264], "big") == size and second[168:208] == first[168:208]
        if not good:
            report("luks.headers_differ", "the second header is missing or another", size)
    try:
        document = load(first[4096:].partition(b"\0")[0])
        segments = document["segments"]
        starts = {name: _number(segment["offset"]) for name, segment in segments.items()}
        slots = document["keyslots"].items()
        costs = {name: _number(slot.get("kdf", {}).get("iterations", 1)) for name, slot in slots}
        areas = {name: _number(slot["area"]["offset"]) + _number(slot["area"]["size"]) for name, slot in slots}
    except (JsonError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Broken("luks.json", f"the description can't be read: {type(error).__name__}", 4096) from error
    start = min(starts.values(), default=0)
    if start < 2 * size:
        report("luks.detached", f"the payload is at byte {start}", 4096)
        return
    report.check(start % 512 == 0 and not view.beyond(start), "luks.header", f"payload at byte {start}", 4096)
    for name, cost in costs.items():
        report.check(0 < cost <= _ITERATIONS, "luks.iterations", f"{cost} iterations in slot {name[:8]!r}", 4096)
    report.check(all(stop <= start for stop in areas.values()), "luks.keyslot", "a key slot in the payload", 4096)
    if view.total is not None:
        report.sizes.append(("luks payload", max(view.total - start, 0)))
