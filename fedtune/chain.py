"""Hash chains: the digest of a row over the digest of the row before it and the canonical bytes of its own columns.

A chain cannot be changed in the middle without changing everything after it, so a reader that checks it to the end knows
that every row is the one that was written, in the order in which it was written.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedtune.foreign import for_json

Value = int | float | str | bytes | None


def canonical(values: Iterable[Value]) -> bytes:
    """Columns as bytes, unambiguous: a letter for the type and, where the length varies, the length before the content.

    >>> canonical([1, "é", b"x", None, 0.5])
    b'I1;S2;\\xc3\\xa9B1;xNF\\x00\\x00\\x00\\x00\\x00\\x00\\xe0?'
    """
    return b"".join(_canonical(value) for value in values)


def _canonical(value: Value) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, int):
        return f"I{int(value)};".encode()
    if isinstance(value, float):
        return b"F" + struct.pack("<d", value)
    kind, content = (b"S", value.encode()) if isinstance(value, str) else (b"B", value)
    return kind + f"{len(content)};".encode() + content


def link(previous: bytes, table: str, values: Iterable[Value]) -> bytes:
    """32 bytes: SHA-256 over the digest of the row before, the table and the columns."""
    return hashlib.sha256(previous + canonical([table, *values])).digest()


def as_text(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """JSON in its one canonical spelling: sorted keys, no spaces, control characters escaped (`fedtune.foreign.for_json`).

    Half a character, which no reader takes, becomes U+FFFD. Raises ValueError for a number that is not finite.

    >>> as_text(["\\ud83d", 1])
    '["\ufffd",1]'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return for_json(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
