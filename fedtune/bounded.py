"""JSON that somebody else may have written, read within bounds: whatever it is, reading ends and fits in memory.

A text may nest a hundred thousand brackets or hold a number of a million digits (`fedtune.regular` opens the files).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

DEEPEST = 32  # brackets inside brackets; ours have six at most
MOST_CONTAINERS = 1_000_000  # objects and lists of one text: what a short text can make large in memory
LARGEST_NUMBER = 2**64  # whole numbers in JSON are below it in size, so that all of them fit a float
_JSON_ESCAPE_OF_HALF = (b"\\ud", b"\\uD")


class BadJsonError(ValueError):
    """A text that is not JSON within the bounds of this file; its message says why in a few words."""


def parse_json(text: bytes | str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text in UTF-8; `object_pairs_hook` as json.loads has it.

    Raises:
        BadJsonError: it is none, is nested deeper than DEEPEST, has more than MOST_CONTAINERS objects and lists, a number that
            is not finite or not below LARGEST_NUMBER in size, or half a character.
    """
    try:
        data = text.encode() if isinstance(text, str) else text
        if data.count(b"{") + data.count(b"[") > MOST_CONTAINERS:
            raise BadJsonError(f"it has more than {MOST_CONTAINERS:,} objects and lists")
        numbers: dict[str, Any] = {"parse_int": _whole, "parse_float": _real, "parse_constant": _refuse_constant}
        value = json.loads(data.decode(), object_pairs_hook=object_pairs_hook, **numbers)
    except RecursionError:
        raise BadJsonError(f"it is nested deeper than {DEEPEST} brackets") from None
    except json.JSONDecodeError as error:
        raise BadJsonError(f"{error.msg} at character {error.pos}") from None
    except UnicodeError:
        raise BadJsonError("it is not UTF-8") from None
    _check_depth(value)
    if any(escape in data for escape in _JSON_ESCAPE_OF_HALF):
        _check_characters(value)
    return value


def _whole(digits: str) -> int:
    number = int(digits) if len(digits) <= 21 else LARGEST_NUMBER
    if abs(number) >= LARGEST_NUMBER:
        raise BadJsonError(f"a number in it has {len(digits)} digits")
    return number


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadJsonError("a number in it is too large")
    return number


def _refuse_constant(name: str) -> None:
    raise BadJsonError(f"{name} is not a number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [item for one in level for item in _inside(one) if isinstance(item, dict | list)]
        if not level:
            return
    raise BadJsonError(f"it is nested deeper than {DEEPEST} brackets")


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_characters(value: Any) -> None:
    """Half a character, which JSON can spell, cannot be written to a file or a terminal."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadJsonError("a text in it has half a character") from None
