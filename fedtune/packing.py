"""Bytes of the coefficients of one pool, in the shortest of five forms.

    zero         all coefficients are zero
    dense        L K whole numbers
    sparse       a bitmap of those that are not zero, and those
    difference   a bitmap and what is to be added to the coefficients that the reader has from an earlier round, after these
                 are rounded to the new grid
    prefixes     the leading coefficients of each block up to the last that is not zero, and how many they are

docs/wire.md is the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from itertools import chain

import numpy as np
import numpy.typing as npt

from fedtune.bits import WHOLE_BYTES, Reader, Whole, integers_packed, narrowest, packed_length, unpack_integers
from fedtune.coefficients import MAX_EXPONENT, MIN_EXPONENT, PoolCoefficients, leading, summable
from fedtune.directions.base import Pool
from fedtune.errors import MalformedMessageError, MismatchError, StaleReplicaError
from fedtune.pieces import AT_ONCE, Buffer, joined, pieces, placed, release
from fedtune.scratch import room

Known = Callable[[], PoolCoefficients | None]
"""Gives the coefficients of a pool that the reader has from an earlier round, if any."""

WIDEST = 25  # bits of a difference of two coefficients of 24 bits
LARGEST = 2**23 - 1  # the largest coefficient of a grid of 24 bits, the widest whose coefficients are summed
LONGEST_PREFIX = 65535  # lengths are 16-bit numbers
PREFIX_ROOM = 1 << 24
"""Bytes that the pools of one message may take when they are read from prefixes, the one form whose bytes do not grow with L K.

A zero pool takes none, and the other forms at most 32 bytes for each byte of the message.
"""


class Form(IntEnum):
    """How the coefficients of a pool are written."""

    ZERO = 0
    DENSE = 1
    SPARSE = 2
    DIFFERENCE = 3
    PREFIXES = 4


def encode_pool(
    coefficients: PoolCoefficients, bits: int, known: PoolCoefficients | None = None, room: int = PREFIX_ROOM
) -> bytes:
    """One pool, in the shortest of its forms.

    Args:
        coefficients: what to write.
        bits: per coefficient.
        known: what the reader has of the pool from an earlier round.
        room: bytes that the message may still take when prefixes are read.
    """
    return joined(pool_packed(coefficients, bits, known, room)[1])


def pool_packed(
    coefficients: PoolCoefficients, bits: int, known: PoolCoefficients | None = None, room: int = PREFIX_ROOM
) -> tuple[Form, Iterator[bytes]]:
    """The form that `encode_pool` takes, and its bytes piece by piece, so that they are never there twice."""
    head = coefficients.pool.identity
    if coefficients.is_zero:
        return Form.ZERO, iter([head + bytes([Form.ZERO])])
    flat = coefficients.q.reshape(-1)
    exponents = coefficients.exponents.astype("<i1").tobytes()
    lengths = {Form.DENSE: packed_length(flat.size, bits), Form.SPARSE: _sparse_length(flat, bits)}
    if coefficients.pool.size <= LONGEST_PREFIX and prefix_bytes(flat.size, bits) <= room:
        lengths[Form.PREFIXES] = 2 * len(coefficients.q) + packed_length(int(prefixes(coefficients.q).sum()), bits)
    if known is not None and known.pool == coefficients.pool and not known.pool.disjoint:
        change = flat - _on_grid(known, coefficients.exponents).reshape(-1)
        width = max(2, int(np.abs(change).max()).bit_length() + 1)
        lengths[Form.DIFFERENCE] = 9 + _sparse_length(change, width)
    form = min(lengths, key=lambda form: lengths[form])
    start = head + bytes([form]) + exponents
    if form == Form.DENSE:
        return form, chain([start], integers_packed(flat, bits))
    if form == Form.SPARSE:
        return form, chain([start], _sparse_packed(flat, bits))
    if form == Form.PREFIXES:
        return form, chain([start], _prefixes_packed(coefficients.q, bits))
    assert known is not None  # a difference is one from something
    return form, chain([start, known.identity[:8], bytes([width])], _sparse_packed(change, width))


def _on_grid(known: PoolCoefficients, exponents: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """int32 [L, K]: `known` on the grid of other exponents, rounded to nearest, halves to even; exact in float64.

    A coefficient that would be too large for the grid is taken for zero.
    """
    moved = np.rint(np.ldexp(known.q.astype(np.float64), (known.exponents - exponents)[:, None]))
    return np.where(np.abs(moved) <= LARGEST, moved, 0.0).astype(np.int32)


def _sparse_packed(flat: Whole, bits: int) -> Iterator[bytes]:
    """A bitmap of what is not zero, then those values."""
    for piece in pieces(flat):
        yield np.packbits(piece != 0, bitorder="little").tobytes()
    if bits in WHOLE_BYTES:
        for piece in pieces(flat):
            yield from integers_packed(piece[piece != 0], bits)
    else:  # what stands in a byte may come from two pieces
        yield from integers_packed(flat[flat != 0], bits)


def _sparse_length(flat: Whole, bits: int) -> int:
    return packed_length(flat.size, 1) + packed_length(sum(int(np.count_nonzero(piece)) for piece in pieces(flat)), bits)


def prefixes(q: Whole) -> npt.NDArray[np.int64]:
    """int64 [L]: how many leading coefficients of each block of `q` [L, K] there are up to the last that is not zero."""
    return np.array([_prefix(row) for row in q], dtype=np.int64)


def _prefix(row: Whole) -> int:
    for where, piece in reversed(list(placed(row))):
        used = np.flatnonzero(piece)
        if len(used):
            return int(where.start) + int(used[-1]) + 1
    return 0


def _prefixes_packed(q: Whole, bits: int) -> Iterator[bytes]:
    """The lengths, then the coefficients of each block."""
    lengths = prefixes(q)
    yield lengths.astype("<u2").tobytes()
    yield from integers_packed(q[leading(lengths, q.shape[1])], bits)


def prefix_bytes(coefficients: int, bits: int) -> int:
    """Bytes of so many coefficients in memory, which prefixes need whatever their own length is."""
    return coefficients * np.dtype(narrowest(bits)).itemsize


def takes_room(form: Form, coefficients: int, bits: int) -> int:
    """Bytes of PREFIX_ROOM that a pool of so many coefficients takes in a form."""
    return prefix_bytes(coefficients, bits) if form == Form.PREFIXES else 0


def decode_pool(data: Buffer, pool: Pool, blocks: int, bits: int, known: Known = lambda: None) -> PoolCoefficients:
    """The inverse of `encode_pool`; `known` is called if the pool is written as a difference.

    Raises:
        MalformedMessageError, MismatchError. StaleReplicaError: a difference from what `known` does not give.
    """
    reader = Reader(data)
    decoded = take_pool(reader, pool, blocks, bits, known)
    reader.finish()
    return decoded


def take_pool(reader: Reader, pool: Pool, blocks: int, bits: int, known: Known) -> PoolCoefficients:
    """`decode_pool` of what comes next in a message."""
    if reader.take(8) != pool.identity:
        raise MismatchError(
            "The message uses another pool of directions: server and client must run with the same seed, family and K."
        )
    size = blocks * pool.size
    form = reader.take(1)[0]
    if form == Form.ZERO:
        return PoolCoefficients.zero(pool, blocks)
    if form not in tuple(Form) or (form == Form.DIFFERENCE and pool.disjoint):
        raise MalformedMessageError(f"There is no form {form} of coefficients.")
    exponents = np.frombuffer(reader.take(blocks), dtype="<i1").astype(np.int32)
    if (exponents < MIN_EXPONENT).any() or (exponents > MAX_EXPONENT).any():
        raise MalformedMessageError("An exponent is outside its range.")
    if form == Form.DENSE:
        q = unpack_integers(reader.take(packed_length(size, bits)), size, bits)
    elif form == Form.SPARSE:
        q = _unpack_sparse(reader, size, bits)
    elif form == Form.PREFIXES:
        reader.spend(prefix_bytes(size, bits), PREFIX_ROOM)
        q = _unpack_prefixes(reader, blocks, pool.size, bits)
    else:
        q = _apply_difference(reader, exponents, size, bits, known)
    q = q.reshape(blocks, pool.size)
    if not summable(pool, q, exponents):
        raise MalformedMessageError("The coefficients of a block are too large for exact sums.")
    return PoolCoefficients(pool, q, exponents)


def _unpack_sparse(reader: Reader, size: int, bits: int) -> Whole:
    """The inverse of `_sparse_packed`: [size], of the narrowest type."""
    marks = np.frombuffer(reader.take(packed_length(size, 1)), np.uint8)
    count = sum(int(np.bitwise_count(piece).sum(dtype=np.int64)) for piece in pieces(marks))
    if size % 8 and marks[-1] >> size % 8:
        raise MalformedMessageError("Padding bits are set.")
    values = unpack_integers(reader.take(packed_length(count, bits)), count, bits)
    flat: Whole = room((size,), narrowest(bits))
    done = 0
    for piece, part in zip(pieces(flat), pieces(marks, AT_ONCE // 8), strict=True):
        used = np.unpackbits(part, count=len(piece), bitorder="little").view(bool)
        found = int(np.count_nonzero(used))
        piece[:] = 0
        piece[used] = values[done : done + found]
        done += found
        release(values)
    return flat


def _unpack_prefixes(reader: Reader, blocks: int, size: int, bits: int) -> Whole:
    """The inverse of `_prefixes_packed`: [blocks, size], of the narrowest type."""
    lengths = np.frombuffer(reader.take(2 * blocks), dtype="<u2").astype(np.int64)
    if (lengths > size).any():
        raise MalformedMessageError(f"A block has {int(lengths.max())} coefficients; the pool has {size} seeds.")
    count = int(lengths.sum())
    values = unpack_integers(reader.take(packed_length(count, bits)), count, bits)
    q: Whole = np.zeros((blocks, size), dtype=narrowest(bits))
    q[leading(lengths, size)] = values
    return q


def _apply_difference(
    reader: Reader,
    exponents: npt.NDArray[np.int32],
    size: int,
    bits: int,
    known: Known,
) -> Whole:
    """[size], of the narrowest type: the coefficients that a difference leads to."""
    name, width = reader.take(8), reader.take(1)[0]
    if not 2 <= width <= WIDEST:
        raise MalformedMessageError(f"A difference has 2 to {WIDEST} bits, not {width}.")
    change = _unpack_sparse(reader, size, width)
    start = known()
    if start is None or start.identity[:8] != name:
        raise StaleReplicaError("The message says what changed since a state that this client does not hold.")
    q = _on_grid(start, exponents).reshape(-1) + change
    if (np.abs(q) > 2 ** (bits - 1) - 1).any():
        raise MalformedMessageError("A coefficient is outside its grid.")
    return q.astype(narrowest(bits))
