"""JSON from strangers: bounded depth and number of values, no repeated keys, no numbers of any length."""

from __future__ import annotations

import json
import re
from typing import Any, Final

__all__ = ["JsonError", "RepeatedKey", "load"]

_DEPTH: Final = 32
_VALUES: Final = 50_000  # objects and lists: an empty one takes two bytes here, and eighty in memory
_DIGITS: Final = 20
# Strings, so that brackets in them don't count, and brackets. Possessive, and an open string runs to the end: else
# each quote in it would be tried anew.
_TOKENS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


class JsonError(ValueError):
    """The document can't be read, or readers would read it differently."""


class RepeatedKey(JsonError):
    """Readers take the first or the last of two values."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise RepeatedKey("a key is repeated")
    return result


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise JsonError("a number is too long")
    return int(text)


def _constant(text: str) -> Any:
    raise JsonError(f"{text} is no JSON")


def load(data: bytes) -> Any:
    """The document in `data`, which is UTF-8. Raises `JsonError`."""
    depth = values = 0
    for token in _TOKENS.finditer(data):
        sign = data[token.start()]
        if sign in b"[{":
            depth += 1
            values += 1
            if depth > _DEPTH or values > _VALUES:
                raise JsonError(f"nested deeper than {_DEPTH}, or more than {_VALUES} objects and lists")
        elif sign in b"]}":
            depth -= 1
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_constant)
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonError(f"not JSON: {type(error).__name__}") from error
