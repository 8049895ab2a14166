"""Philox4x32-10 compiled: the numbers of `fedtune.philox`, many blocks at a time in vector registers."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedtune import philox
from fedtune.directions.cpu.compiled import kernel

M0, M1 = np.uint64(philox.MULTIPLIER_0), np.uint64(philox.MULTIPLIER_1)
W0, W1 = np.uint64(philox.WEYL_0), np.uint64(philox.WEYL_1)
MASK, HALF = np.uint64(philox.MASK32), np.uint64(32)


@kernel
def random_blocks(words: Any, first: int, k: int, purpose: int, key0: int, key1: int) -> None:
    """words uint32 [n, 4]: row j is the block with counter (first + j, k, purpose)."""
    for j in range(words.shape[0]):
        block = np.uint64(first) + np.uint64(j)
        c0, c1 = np.uint32(block), np.uint32(block >> HALF)
        c2, c3 = np.uint32(k), np.uint32(purpose)
        a, b = np.uint64(key0), np.uint64(key1)
        for _ in range(10):
            p0, p1 = M0 * np.uint64(c0), M1 * np.uint64(c2)
            c0, c1 = np.uint32(np.uint32(p1 >> HALF) ^ c1 ^ np.uint32(a)), np.uint32(p1)
            c2, c3 = np.uint32(np.uint32(p0 >> HALF) ^ c3 ^ np.uint32(b)), np.uint32(p0)
            a, b = (a + W0) & MASK, (b + W1) & MASK
        words[j, 0] = c0
        words[j, 1] = c1
        words[j, 2] = c2
        words[j, 3] = c3
