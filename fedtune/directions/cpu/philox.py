"""Philox4x32-10 compiled: the numbers of `fedtune.philox`, many blocks at a time in vector registers.

Word i of all blocks is computed into a plane of its own: LLVM vectorises that loop, but not one that writes blocks. High
halves of the 64-bit numbers are cut off where a product reads them only, which is free: that makes it one of 32 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedtune import philox
from fedtune.directions.cpu.compiled import kernel

M0, M1 = np.uint64(philox.MULTIPLIER_0), np.uint64(philox.MULTIPLIER_1)
W0, W1 = np.uint64(philox.WEYL_0), np.uint64(philox.WEYL_1)
MASK, HALF = np.uint64(philox.MASK32), np.uint64(32)

SCRATCH = 8
"""Words of scratch that `random_words` needs for a block: four for the result and four to work with."""


@kernel
def random_planes(x0: Any, x1: Any, x2: Any, x3: Any, first: int, k: int, purpose: int, key0: int, key1: int) -> None:
    """x0 .. x3 uint32 [n]: words 0 .. 3 of the blocks with counters (first + j, k, purpose)."""
    for j in range(x0.shape[0]):
        block = np.uint64(first) + np.uint64(j)
        c0, c1, c2, c3 = block & MASK, block >> HALF, np.uint64(k), np.uint64(purpose)
        a, b = np.uint64(key0), np.uint64(key1)
        for _ in range(10):
            p0, p1 = M0 * (c0 & MASK), M1 * (c2 & MASK)
            c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ a, p1, (p0 >> HALF) ^ c3 ^ b, p0
            a, b = (a + W0) & MASK, (b + W1) & MASK
        x0[j] = np.uint32(c0)
        x1[j] = np.uint32(c1)
        x2[j] = np.uint32(c2)
        x3[j] = np.uint32(c3)


@kernel
def random_words(scratch: Any, first: int, count: int, k: int, purpose: int, key0: int, key1: int) -> Any:
    """uint32 [4 * count], a part of `scratch` (uint32 [>= SCRATCH * count]): the blocks `first` on, one after another."""
    words = scratch[: 4 * count]
    x0, x1 = scratch[4 * count : 5 * count], scratch[5 * count : 6 * count]
    x2, x3 = scratch[6 * count : 7 * count], scratch[7 * count : 8 * count]
    random_planes(x0, x1, x2, x3, first, k, purpose, key0, key1)
    for j in range(count):
        words[4 * j] = x0[j]
        words[4 * j + 1] = x1[j]
        words[4 * j + 2] = x2[j]
        words[4 * j + 3] = x3[j]
    return words
