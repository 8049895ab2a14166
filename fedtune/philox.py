"""Philox4x32-10, the counter-based generator behind every direction and every named stream.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3 (Random123).
Four 32-bit words of counter and two of key give four 32-bit words, from integer arithmetic alone, so the value is the
same on every machine. This file is the numpy form: plain, and the reference for the compiled kernels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9  # golden ratio
WEYL_1 = 0xBB67AE85  # sqrt(3) - 1
ROUNDS = 10
MASK32 = 0xFFFFFFFF

U32 = npt.NDArray[np.uint32]


def philox4x32(counter: U32, key: tuple[int, int]) -> U32:
    """Ten rounds of Philox4x32.

    Args:
        counter: uint32 [n, 4], least significant word first.
        key: two 32-bit words.

    Returns:
        uint32 [n, 4], the random words.
    """
    words = counter.astype(np.uint64)
    c0, c1, c2, c3 = (words[:, i] for i in range(4))
    k0, k1 = key[0] & MASK32, key[1] & MASK32
    mask, shift = np.uint64(MASK32), np.uint64(32)
    for _ in range(ROUNDS):
        p0 = np.uint64(MULTIPLIER_0) * c0
        p1 = np.uint64(MULTIPLIER_1) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & mask, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & mask
        k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def words(key: int, start: int, count: int) -> U32:
    """`count` 32-bit words of the stream named by a 64-bit `key`, from word number `start` on.

    Word number i is word i % 4 of the block with counter (i // 4) (a 128-bit counter, low words first).
    """
    first, last = start // 4, (start + count + 3) // 4
    blocks = np.arange(first, last, dtype=np.uint64)
    counter = np.zeros((len(blocks), 4), dtype=np.uint32)
    counter[:, 0] = (blocks & np.uint64(MASK32)).astype(np.uint32)
    counter[:, 1] = (blocks >> np.uint64(32)).astype(np.uint32)
    flat = philox4x32(counter, (key & MASK32, key >> 32)).reshape(-1)
    return flat[start - 4 * first : start - 4 * first + count]
