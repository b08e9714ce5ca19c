"""Several digests of one stream at once, each in order on its own lane of a shared pool."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from imagestore._pool import Lane
from imagestore.errors import DigestMismatch, InvalidRequest

__all__ = ["Digests", "block_digest", "check_expected", "compare"]

QUEUE: Final = 2
"""Blocks that may wait for each digest: enough to keep it busy, little enough to keep memory small."""


def _new(algorithm: str) -> hashlib._Hash:
    try:
        digest = hashlib.new(algorithm, usedforsecurity=False)
    except (ValueError, TypeError):
        digest = None
    if digest is None or digest.digest_size == 0:
        usable = sorted(name for name in hashlib.algorithms_guaranteed if not name.startswith("shake"))
        raise InvalidRequest(f"no digest algorithm {algorithm!r}; there are {', '.join(usable)}")
    return digest


def block_digest(algorithm: str, data: bytes) -> bytes:
    """The raw digest of one block, for a backend that compares it."""
    return hashlib.new(algorithm, data, usedforsecurity=False).digest()


def check_expected(
    digests: Iterable[str], expected: Mapping[str, str] | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """All algorithms to compute and the expected digests in lower case.

    Raises `InvalidRequest` for an unknown algorithm, or an expected digest that is not hexadecimal of its length.
    """
    if isinstance(digests, str):
        raise InvalidRequest(f"digests is a list of names: [{digests!r}], not {digests!r}")
    wanted = {name: value.strip().lower() for name, value in (expected or {}).items()}
    for name, value in wanted.items():
        size = _new(name).digest_size
        if len(value) != 2 * size or not all(c in "0123456789abcdef" for c in value):
            raise InvalidRequest(f"the expected {name} digest is not {2 * size} hexadecimal digits: {value!r}")
    names = tuple(dict.fromkeys((*digests, *wanted)))
    for name in names:
        _new(name)
    return names, wanted


def compare(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise `DigestMismatch` unless all expected digests were found."""
    for name, value in expected.items():
        if found[name] != value:
            raise DigestMismatch(f"the {name} digest is {found[name]}, expected {value}")


class Digests:
    """Digests of all data given to `update`, in order.

    Hashing in a thread each costs the slowest digest, inline it costs their sum; small data is hashed inline, since
    handing it over would cost more.
    """

    def __init__(self, algorithms: Iterable[str], pool: Callable[[], ThreadPoolExecutor]) -> None:
        self._hashes = {name: _new(name) for name in algorithms}
        self._pool = pool
        self._lanes: dict[str, Lane] = {}

    def __len__(self) -> int:
        return len(self._hashes)

    def update(self, data: bytes, done: Callable[[], None], check: Callable[[], None], *, inline: bool = False) -> None:
        """Add ``data``; ``done`` is called once for each digest, when it needs the data no more."""
        if inline:
            for digest in self._hashes.values():
                digest.update(data)
                done()
            return
        for name, digest in self._hashes.items():
            lane = self._lanes.get(name)
            if lane is None:
                lane = self._lanes[name] = Lane(self._pool(), 1)
            lane.wait(QUEUE, check)
            if lane.error is not None:
                raise lane.error
            lane.submit(functools.partial(digest.update, data), done)

    def finish(self) -> dict[str, str]:
        """Wait for all and return the hexadecimal digests."""
        for lane in self._lanes.values():
            lane.wait()
            if lane.error is not None:
                raise lane.error
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}

    def close(self) -> None:
        """Give up: nothing runs any more when it returns."""
        for lane in self._lanes.values():
            lane.drop()
