"""CRC-32C (Castagnoli, RFC 3720 appendix B.4), which VHDX uses and Python lacks."""

from __future__ import annotations

from typing import Final

__all__ = ["crc32c"]

_POLYNOMIAL: Final = 0x82F63B78


def _table() -> tuple[int, ...]:
    table = []
    for index in range(256):
        value = index
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _apply(matrix: tuple[int, ...], value: int) -> int:
    result = 0
    for column in matrix:
        if not value:
            break
        if value & 1:
            result ^= column
        value >>= 1
    return result


def _zeros() -> tuple[tuple[int, ...], ...]:
    """For each power of two n up to 2^16, the matrix that takes a state over n zero bytes."""
    one = tuple((state >> 8) ^ _TABLE[state & 0xFF] for state in (1 << bit for bit in range(32)))
    matrices = [one]
    for _ in range(16):
        last = matrices[-1]
        matrices.append(tuple(_apply(last, column) for column in last))
    return tuple(matrices)


_TABLE: Final = _table()
_ZEROS: Final = _zeros()


def crc32c(data: bytes) -> int:
    """The checksum of `data`, at most 128 KiB. Zeros at the end, most of these structures, cost next to nothing."""
    dense = data.rstrip(b"\0")
    state = 0xFFFF_FFFF
    for byte in dense:
        state = state >> 8 ^ _TABLE[(state ^ byte) & 0xFF]
    rest = len(data) - len(dense)
    for power, matrix in enumerate(_ZEROS):
        if rest >> power & 1:
            state = _apply(matrix, state)
    return state ^ 0xFFFF_FFFF
