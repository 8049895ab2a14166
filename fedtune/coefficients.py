"""What a fine-tuned model is besides its base: whole numbers on a power-of-two grid, for each pool of the run.

    w = w0 + sum over pools of sum_l sum_k (q[l,k] * 2^e[l]) z[l,k]

The grid is what makes the model the same everywhere: with +-1 directions and sum_k |q[l,k]| <= 2^24 every partial sum is
exact in float32, in any order and on any device. Directions that share no position (family `axes`) need no such limit: a
weight takes one number, rounded to float32 once. It is also the wire format. The server accumulates in float64 and
publishes the rounded values, so rounding errors do not add up over the rounds.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from fedtune.bits import Whole, narrowest
from fedtune.directions.base import F32, F64, Bools, Floats, Pool
from fedtune.errors import NonFiniteError
from fedtune.pieces import pieces
from fedtune.scratch import IN_MEMORY, room

I32 = npt.NDArray[np.int32]
EXACT_SUM = 2**24  # the largest whole number up to which float32 counts exactly
MIN_EXPONENT, MAX_EXPONENT = -120, 100  # sums of coefficients stay normal float32 numbers
COARSE_BITS = 8  # with fewer bits, large coefficients are cut off where that leaves less error
FINER = 6  # halvings of the grid that are tried
AT_ONCE = 1 << 18  # coefficients that are widened at a time
WIDE_BITS = 8  # bits that a coefficient without sums may have above 24


@dataclass(frozen=True, eq=False)
class PoolCoefficients:
    """The coefficients of one pool: C[l, k] = q[l, k] * 2^exponents[l].

    Attributes:
        pool: whose directions they multiply.
        q: whole numbers [L, K]: int8, int16 or int32. The server keeps those of every finished pool, so `quantise` gives the
            narrowest type that its bits allow.
        exponents: int32 [L], each in MIN_EXPONENT .. MAX_EXPONENT, zero for a block without coefficients.
    """

    pool: Pool
    q: Whole
    exponents: I32

    @property
    def values(self) -> F32:
        """float32 [L, K]: exact up to 24 bits, else rounded once; computed anew each time, so nothing of it is kept."""
        values: F32 = room(self.q.shape, np.float32)
        for row, q, exponent in zip(values, self.q, self.exponents, strict=True):
            for out, piece in zip(pieces(row), pieces(q), strict=True):
                np.ldexp(piece.astype(np.float32), exponent, out=out)
        return values

    @classmethod
    def zero(cls, pool: Pool, blocks: int) -> Self:
        """A pool that changes nothing: read-only arrays that are one number in memory, whatever L and K."""
        return cls(pool, np.broadcast_to(np.int8(0), (blocks, pool.size)), np.broadcast_to(np.int32(0), (blocks,)))

    @cached_property
    def is_zero(self) -> bool:
        """Whether the pool changes nothing."""
        return not any(piece.any() for row in (self.q[:1, :1] if self.q.strides == (0, 0) else self.q) for piece in pieces(row))

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays in memory."""
        return 0 if self.q.strides == (0, 0) else self.q.nbytes + self.exponents.nbytes

    @cached_property
    def identity(self) -> bytes:
        """32 bytes over the pool and the coefficients."""
        state = hashlib.sha256(self.pool.identity)
        for row in self.q:
            for piece in pieces(row, AT_ONCE):
                state.update(np.ascontiguousarray(piece, dtype="<i4").data)
        state.update(np.ascontiguousarray(self.exponents, dtype="<i4").data)
        return state.digest()


@dataclass(frozen=True, eq=False)
class Coefficients:
    """All pools of a model in order; the last one may still be open (its run goes on), those before are final."""

    pools: tuple[PoolCoefficients, ...]

    def digest(self, fingerprint: bytes) -> bytes:
        """16 bytes that name the model: base fingerprint and every non-zero pool in order."""
        state = hashlib.sha256(fingerprint)
        for pool in self.pools:
            if not pool.is_zero:
                state.update(pool.identity)
        return state.digest()[:16]


def leading(counts: npt.NDArray[np.int64], size: int) -> Bools:
    """bool [L, K]: the first `counts[l]` of the `size` seeds of a pool in each block l."""
    return np.asarray(np.arange(size) < counts[:, None])


def summable(pool: Pool, q: Whole, exponents: I32) -> bool:
    """Whether coefficients can be added to float32 weights everywhere alike: their sums are exact, or there are none."""
    if pool.disjoint:
        large = q.nbytes > IN_MEMORY  # then in a file, of whose pages few are to be held
        used = [any(piece.any() for piece in pieces(row)) for row in q] if large else q.any(axis=1)
        return bool((exponents[used] <= MAX_EXPONENT - WIDE_BITS).all())
    sizes = np.abs(q).view(f"u{q.itemsize}")  # the number without an opposite too
    return bool((sizes.sum(axis=1, dtype=np.int64) <= EXACT_SUM).all())


def quantise(pool: Pool, values: Floats, bits: int) -> PoolCoefficients:
    """Round `values` to the finest grid that `bits` per coefficient and exact float32 sums allow, block by block.

    With fewer than COARSE_BITS one large coefficient would make the grid too coarse for all others, so a finer one that leaves
    less squared error is taken, and what is larger than its largest number is sent as that. The server accumulates the exact
    values, so what is cut off is not lost.

    Args:
        pool: whose coefficients they are.
        values: float64 or float32 [L, K].
        bits: 2 .. 24, or .. 32 for directions that share no position; |q| <= 2^(bits-1) - 1.

    Raises:
        NonFiniteError: a value is not finite, or too large for float32.
    """
    exponents = np.zeros(values.shape[0], dtype=np.int32)
    q: Whole = room(values.shape, narrowest(bits))
    for block, row in enumerate(values):
        exponents[block] = _quantise_row(row, q[block], bits, pool.disjoint)
    return PoolCoefficients(pool, q, exponents)


def _quantise_row(row: Floats, q: Whole, bits: int, disjoint: bool) -> int:
    """Write the rounded coefficients of a block to `q`; returns the exponent of their grid."""
    limit = 2 ** (bits - 1) - 1
    highest = MAX_EXPONENT - WIDE_BITS if disjoint else MAX_EXPONENT
    largest = _largest(row)
    if not math.isfinite(largest):
        raise NonFiniteError("A coefficient is not finite: the state is left as it was. Lower lr.")
    if largest == 0.0:
        q[:] = 0
        return 0
    total = 0.0 if disjoint else float(np.abs(row).sum())
    exponent = max(math.frexp(max(largest / limit, total / EXACT_SUM))[1] - 1, MIN_EXPONENT)
    while not _fits(row, largest, exponent, limit, disjoint):
        exponent += 1
    if exponent > highest:
        raise NonFiniteError(f"A coefficient of {largest:.3g} is too large for float32 weights. Lower lr.")
    if bits < COARSE_BITS:
        wide = row.astype(np.float64)
        rounded, exponent = _least_error(wide, np.rint(np.ldexp(wide, -exponent)), exponent, limit)
        q[:] = rounded
    else:
        for piece, out in zip(pieces(row), pieces(q), strict=True):
            out[:] = np.rint(np.ldexp(piece.astype(np.float64), -exponent))
    return exponent if any(piece.any() for piece in pieces(q)) else 0


def _largest(row: Floats) -> float:
    """The largest absolute value; infinite or NaN if one is."""
    return float(np.max([np.abs(piece).max(initial=0.0) for piece in pieces(row)], initial=0.0))


def _fits(row: Floats, largest: float, exponent: int, limit: int, disjoint: bool) -> bool:
    """Whether the coefficients of a block, rounded to a grid, are at most `limit` and have an exact sum."""
    if np.rint(np.ldexp(largest, -exponent)) > limit:
        return False
    return disjoint or bool(np.abs(np.rint(np.ldexp(row, -exponent))).sum() <= EXACT_SUM)


def _least_error(row: F64, rounded: F64, exponent: int, limit: int) -> tuple[F64, int]:
    """A grid up to FINER steps finer, cut off at `limit`, that leaves the least squared error; the coarsest of equals."""
    best = rounded, exponent, _error(row, rounded, exponent)
    for finer in range(exponent - 1, max(exponent - FINER, MIN_EXPONENT) - 1, -1):
        cut = np.clip(np.rint(np.ldexp(row, -finer)), -limit, limit)
        error = _error(row, cut, finer)
        if np.abs(cut).sum() > EXACT_SUM:
            break
        if error < best[2]:
            best = cut, finer, error
    return best[:2]


def _error(row: F64, rounded: F64, exponent: int) -> float:
    """The squared error that a rounding leaves, the same on every machine (no sum whose order is open)."""
    return math.fsum(np.square(np.ldexp(rounded, exponent) - row).tolist())
