"""Philox4x32-10 in Triton: the numbers of `fedtune.philox`, and what is made of them: words in order, and signs."""

from __future__ import annotations

import triton.language as tl

from fedtune import philox
from fedtune.directions.gpu.compiled import device_function

M0, M1 = tl.constexpr(philox.MULTIPLIER_0), tl.constexpr(philox.MULTIPLIER_1)
W0, W1 = tl.constexpr(philox.WEYL_0), tl.constexpr(philox.WEYL_1)
ROUNDS = tl.constexpr(philox.ROUNDS)

STRETCH = tl.constexpr(4096)
"""Positions that one program works on; a stretch starts at a multiple of it. Divides the smallest hadamard tile."""


@device_function
def random_planes(
    block: tl.tensor, k: tl.tensor, purpose: tl.tensor, key0: tl.tensor, key1: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Words 0 .. 3, each uint32 of the shape of `block` (int64): the blocks with counters (block, k, purpose)."""
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = c0 * 0 + k  # of the shape and type of c0, also where k is a constant
    c3 = c0 * 0 + purpose
    a, b = key0.to(tl.uint32), key1.to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        p0, p1 = c0.to(tl.uint64) * M0, c2.to(tl.uint64) * M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ a, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ b, p0.to(tl.uint32)
        a, b = a + W0, b + W1
    return c0, c1, c2, c3


@device_function
def interleave(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """[4 n]: a[0], b[0], c[0], d[0], a[1], ... of four [n]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * a.shape[0],))


@device_function
def sign_words(start: tl.tensor, k: tl.tensor, purpose: tl.tensor, key0: tl.tensor, key1: tl.tensor) -> tl.tensor:
    """uint32 [STRETCH / 32]: the sign bits of the positions from `start` on, a multiple of STRETCH."""
    x0, x1, x2, x3 = random_planes((start >> 7) + tl.arange(0, STRETCH // 128), k, purpose, key0, key1)
    return interleave(x0, x1, x2, x3)


@device_function
def is_set(words: tl.tensor) -> tl.tensor:
    """bool [STRETCH]: bit p % 32 of word p / 32."""
    bits = (words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    return tl.reshape(bits, (STRETCH,)) != 0
