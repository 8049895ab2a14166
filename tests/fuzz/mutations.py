"""Inputs that are nearly right: a sound message with a few faults, a document with another value in it, and plain noise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tests.fuzz.harness import LARGEST

NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
HEAD = 96  # bytes in which most numbers stand that decide about the rest


@st.composite
def mutated(draw: DrawFn, corpus: Sequence[bytes]) -> bytes:
    """One of `corpus` with up to four faults."""
    data = draw(st.sampled_from(corpus))
    for _ in range(draw(st.integers(0, 4))):
        data = draw(st.sampled_from(_FAULTS))(draw, data, corpus)
    return data[:LARGEST]


def _place(draw: DrawFn, data: bytes) -> int:
    """A position, every other time near the front."""
    near = min(len(data), HEAD) if draw(st.booleans()) else len(data)
    return draw(st.integers(0, near))


def _flip(draw: DrawFn, data: bytes, corpus: Sequence[bytes]) -> bytes:
    at = _place(draw, data)
    return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :] if at < len(data) else data


def _number(draw: DrawFn, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Another number at a place: counts, lengths, exponents, versions."""
    at, width = _place(draw, data), draw(st.sampled_from((1, 2, 4, 8)))
    value = draw(st.sampled_from(NUMBERS) | st.integers(0, 2**64 - 1)) % (1 << 8 * width)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _truncate(draw: DrawFn, data: bytes, corpus: Sequence[bytes]) -> bytes:
    return data[: _place(draw, data)]


def _extend(draw: DrawFn, data: bytes, corpus: Sequence[bytes]) -> bytes:
    return data + draw(st.binary(min_size=1, max_size=64) | st.integers(1, LARGEST).map(bytes))


def _cut(draw: DrawFn, data: bytes, corpus: Sequence[bytes]) -> bytes:
    at = _place(draw, data)
    return data[:at] + data[at + draw(st.integers(1, 64)) :]


def _repeat(draw: DrawFn, data: bytes, corpus: Sequence[bytes]) -> bytes:
    at = _place(draw, data)
    return data[:at] + data[at : at + draw(st.integers(1, 256))] * draw(st.integers(2, 64)) + data[at:]


def _splice(draw: DrawFn, data: bytes, corpus: Sequence[bytes]) -> bytes:
    other = draw(st.sampled_from(corpus))
    return data[: _place(draw, data)] + other[_place(draw, other) :]


_FAULTS: tuple[Callable[[DrawFn, bytes, Sequence[bytes]], bytes], ...] = (
    _flip, _flip, _number, _number, _truncate, _extend, _cut, _repeat, _splice,
)  # fmt: skip


def noise(*heads: bytes) -> SearchStrategy[bytes]:
    """Random bytes, few or many, alone or behind one of `heads`."""
    many = st.builds(lambda seed, length: random.Random(seed).randbytes(length), st.integers(0), st.integers(0, LARGEST - 64))
    return st.builds(lambda head, tail: (head + tail)[:LARGEST], st.sampled_from((b"", *heads)), st.binary(max_size=256) | many)


# ---------------------------------------------------------------------------------------------------- documents


ODD: tuple[Any, ...] = (
    *(2**63, -(2**70), 10**400, float("nan"), float("inf"), 1e308, -0.0),
    *("", "\x00", "\x1b[2J", "\ud83d", "[/]", "\u202e", "a" * 5000),
)


def values() -> SearchStrategy[Any]:
    """Anything that JSON can hold, and what Python's reader takes beside it."""
    text, short = st.text(max_size=20), st.text(max_size=8)
    plain = st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from(ODD)
    return st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(short, inner, max_size=4))


@st.composite
def another_value(draw: DrawFn, document: Any) -> Any:
    """`document` with one value in it, at any depth, replaced or taken out."""
    if isinstance(document, dict) and document and draw(st.integers(0, 7)):
        key = draw(st.sampled_from(sorted(document)))
        changed = {name: value for name, value in document.items() if name != key}
        return changed if draw(st.integers(0, 7)) == 0 else {**changed, key: draw(another_value(document[key]))}
    if isinstance(document, list) and document and draw(st.integers(0, 7)):
        at = draw(st.integers(0, len(document) - 1))
        return [*document[:at], draw(another_value(document[at])), *document[at + 1 :]]
    return draw(values())


def as_json(value: Any) -> bytes:
    """As Python writes it: NaN, and half a surrogate pair as an escape."""
    return json.dumps(value).encode()


def documents(*sound: Any) -> SearchStrategy[bytes]:
    """JSON texts: one of `sound` with another value, or with faults in its bytes; deep ones, long numbers, noise."""
    texts = [as_json(document) for document in sound]
    changed = st.sampled_from(sound).flatmap(another_value).map(as_json)
    marks = st.sampled_from((b"[", b'{"a":', b"[[],"))
    deep = st.builds(lambda mark, depth: mark * depth, marks, st.integers(1, 5000))
    long = st.integers(1, 30_000).map(lambda digits: b"[" + b"9" * digits + b"]")
    return changed | changed | mutated(texts) | deep | long | noise(b"{", b"[", b"\xef\xbb\xbf{", b"\xff\xfe")
