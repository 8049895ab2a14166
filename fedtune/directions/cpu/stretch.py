"""Planes of random words for a stretch of a family's positions: Philox4x32-10 for many seeds at the same positions.

Plane m of a stretch holds word m of every block. With the block number in counter word 0, the first round's products and
one of the second's do not depend on the seed, so a stretch makes them once (`begin`) and each seed does the last eight rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from fedtune import philox
from fedtune.directions.cpu.compiled import instructions, kernel
from fedtune.directions.cpu.vectors import INT32, INT64, Vectors, load, places, repeat

BLOCKS = 256
STRETCH = 4 * BLOCKS
"""Positions of a stretch, four to a block: small enough for all that a kernel holds to stay in the first-level cache."""

GROUP = 16
"""Kernels work on whole groups of this many blocks; what lies beyond the last block asked for is of no use."""

M0, M1 = np.uint64(philox.MULTIPLIER_0), np.uint64(philox.MULTIPLIER_1)
W0, W1 = np.uint64(philox.WEYL_0), np.uint64(philox.WEYL_1)
MASK, HALF = np.uint64(philox.MASK32), np.uint64(32)
ORDER = (0, 1, 4, 5, 2, 3, 6, 7)
"""Blocks of a group of eight in two vectors of four: taking the low halves of both within each 128 bits puts them in order."""


@kernel
def begin(tables: Any, first: int, count: int, purpose: int, key: Any) -> None:
    """tables uint64 [2, BLOCKS]: the products that all seeds share for the blocks first .. first + count - 1.

    The blocks agree in their high 32 bits. Row 0 is the second round's product of word 2, row 1 the first round's of word 0.
    """
    offsets = np.array(ORDER, np.uint64)
    for j in range(count):
        block = np.uint64(first) + np.uint64(j & ~7) + offsets[j & 7]
        product = M0 * (block & MASK)
        tables[0, j] = M1 * (((product >> HALF) ^ np.uint64(purpose) ^ np.uint64(key[1])) & MASK)
        tables[1, j] = product


@kernel
def seed_words(words: Any, tables: Any, first: int, count: int, k: int, key: Any) -> None:
    """words uint32 [4, BLOCKS]: the planes of seed k for the blocks that `tables` was begun with; count is in whole groups."""
    a, b = np.uint64(key[0]), np.uint64(key[1])
    product = M1 * np.uint64(k)
    word0 = ((product >> HALF) ^ (np.uint64(first) >> HALF) ^ a) & MASK
    a, b = (a + W0) & MASK, (b + W1) & MASK
    second = M0 * word0
    mix0, mix2, word3 = (product & MASK) ^ a, (second >> HALF) ^ b, second & MASK
    a, b = (a + W0) & MASK, (b + W1) & MASK
    for j in range(0, count, 8):
        _eight_rounds(words, tables, j, mix0, mix2, word3, a, b)


@instructions
def _eight_rounds(typing: Any, words: Any, tables: Any, j: Any, mix0: Any, mix2: Any, word3: Any, key0: Any, key1: Any) -> Any:
    """words[:, j : j + 8] from `tables` and from what the first two rounds made of the seed; the keys are the third round's.

    In lanes of 64 bits: the high half of a lane counts for nothing, since a product reads low halves only.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, tables, j, mix0, mix2, word3, key0, key1 = arguments
        starts = [builder.add(j, ir.Constant(INT64, offset)) for offset in (0, 4, BLOCKS, BLOCKS + 4)]
        at = places(context, builder, signature.args[1], tables, starts, 4)
        p1, p0 = load(builder, at[:2]), load(builder, at[2:])
        c0, c1 = (p1 >> 32) ^ repeat(builder, mix0, 4, 2), p1
        c2, c3 = p0 ^ repeat(builder, mix2, 4, 2), repeat(builder, word3, 4, 2)
        for _ in range(philox.ROUNDS - 2):
            p0, p1 = (c0 & int(MASK)) * int(M0), (c2 & int(MASK)) * int(M1)
            c0, c1 = (p1 >> 32) ^ c1 ^ repeat(builder, key0, 4, 2), p1
            c2, c3 = (p0 >> 32) ^ c3 ^ repeat(builder, key1, 4, 2), p0
            key0, key1 = _next(builder, key0, W0), _next(builder, key1, W1)
        for m, word in enumerate((c0, c1, c2, c3)):
            start = builder.add(j, ir.Constant(INT64, m * BLOCKS))
            _low_halves(word).store(places(context, builder, signature.args[0], words, [start], 8))
        return context.get_dummy_value()

    u64 = types.uint64
    return types.void(words, tables, types.int64, u64, u64, u64, u64, u64), build


def _next(builder: Any, key: Any, step: np.uint64) -> Any:
    return builder.and_(builder.add(key, ir.Constant(INT64, int(step))), ir.Constant(INT64, int(MASK)))


def _low_halves(words: Vectors) -> Vectors:
    """The low halves of two vectors of four, whose blocks stand as in ORDER, in the order of the blocks."""
    builder = words.builder
    a, b = (builder.bitcast(x, ir.VectorType(INT32, 8)) for x in words.each)
    chosen = ir.Constant(ir.VectorType(INT32, 8), [0, 2, 8, 10, 4, 6, 12, 14])
    return Vectors(builder, [builder.shuffle_vector(a, b, chosen)])
