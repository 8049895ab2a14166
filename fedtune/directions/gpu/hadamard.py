"""Family hadamard in Triton: one fast Walsh-Hadamard transform of 4096 elements a program, whatever the size of the pool.

A tile of n = 2^BITS > 4096 positions (a pool of more than 4096 seeds) is worked on in stretches of 4096: row i = (h, l)
of column c = (g, m) has the sign (-1)^(popcount(h & g) + popcount(l & m)), so `combine` first folds the coefficients over
g with the signs that h gives, and `project` signs the result by h & g. `combine` reads a coefficient where its column
is, by the inverse of the tile's permutation: nothing is scattered.

S0, S1, S2 are the shifts of the permutation (`counters.column_shifts`).
"""

from __future__ import annotations

import triton.language as tl

from fedtune.directions import counters
from fedtune.directions.gpu.compiled import device_function, kernel
from fedtune.directions.gpu.philox import STRETCH, is_set, random_planes, sign_words
from fedtune.directions.gpu.stretch import read, rounded, start_of, write

SIGNS, COLUMNS = tl.constexpr(counters.SIGNS), tl.constexpr(counters.COLUMNS)


@kernel
def add(
    out: tl.tensor,
    base: tl.tensor,
    p0: tl.tensor,
    length: tl.tensor,
    k: tl.tensor,
    c: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    BITS: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
) -> None:
    """out[i] = base[i] + c * z_k[p0 + i], from sign bits alone."""
    start = start_of(tl.program_id(0), p0)
    w0, w1, w2, w3 = random_planes(start >> BITS, 0, COLUMNS, key0, key1)
    column = _column(k.to(tl.uint32), w0, w1, w2, w3, BITS, S0, S1, S2)
    words = sign_words(start, 0, SIGNS, key0, key1) ^ _column_signs(column, start, BITS)
    write(out, read(base, start, p0, length) + tl.where(is_set(words), -c, c), start, p0, length)


@kernel
def move_and_add(
    weight: tl.tensor,
    out: tl.tensor,
    p0: tl.tensor,
    length: tl.tensor,
    k1: tl.tensor,
    c1: tl.tensor,
    k2: tl.tensor,
    c2: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    BITS: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
) -> None:
    """weight[i] += c1 * z_k1[p0 + i], rounded to its type, then out[i] = weight[i] + c2 * z_k2[p0 + i]."""
    start = start_of(tl.program_id(0), p0)
    w0, w1, w2, w3 = random_planes(start >> BITS, 0, COLUMNS, key0, key1)
    shared = sign_words(start, 0, SIGNS, key0, key1)
    words = shared ^ _column_signs(_column(k1.to(tl.uint32), w0, w1, w2, w3, BITS, S0, S1, S2), start, BITS)
    moved = read(weight, start, p0, length) + tl.where(is_set(words), -c1, c1)
    write(weight, moved, start, p0, length)
    words = shared ^ _column_signs(_column(k2.to(tl.uint32), w0, w1, w2, w3, BITS, S0, S1, S2), start, BITS)
    write(out, rounded(weight, moved).to(tl.float32) + tl.where(is_set(words), -c2, c2), start, p0, length)


@kernel
def combine(
    out: tl.tensor,
    base: tl.tensor,
    coefficients: tl.tensor,
    p0: tl.tensor,
    length: tl.tensor,
    size: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    BITS: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
) -> None:
    """out[i] = base[i] + sum_k coefficients[k] * z_k[p0 + i]; `coefficients` is float32 [size]."""
    start = start_of(tl.program_id(0), p0)
    w0, w1, w2, w3 = random_planes(start >> BITS, 0, COLUMNS, key0, key1)
    low = tl.arange(0, STRETCH).to(tl.uint32)
    sums = tl.zeros((STRETCH,), tl.float32)
    for fold in range(1 << (BITS - 12)):
        k = _seed(low + fold * STRETCH, w0, w1, w2, w3, BITS, S0, S1, S2).to(tl.int32)
        values = tl.load(coefficients + k, mask=k < size, other=0.0)
        sums += tl.where(_odd(_part(start, BITS) & fold), -values, values)
    sums = _walsh_hadamard(sums)
    sums = tl.where(is_set(sign_words(start, 0, SIGNS, key0, key1)), -sums, sums)
    write(out, read(base, start, p0, length) + sums, start, p0, length)


@kernel
def project(
    partial: tl.tensor,
    delta: tl.tensor,
    p0: tl.tensor,
    length: tl.tensor,
    per_group: tl.tensor,
    size: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    BITS: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """partial[g, k] = sum of delta[i] * z_k[p0 + i] over the `per_group` stretches of group g; float32 within a stretch,
    float64 over stretches, in order of position. Program (g, j) has the seeds j * WIDTH on."""
    group = tl.program_id(0)
    seeds = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros((WIDTH,), tl.float64)
    for number in range(per_group):
        start = start_of(group * per_group + number, p0)
        values = read(delta, start, p0, length)
        values = tl.where(is_set(sign_words(start, 0, SIGNS, key0, key1)), -values, values)
        values = _walsh_hadamard(values)
        w0, w1, w2, w3 = random_planes(start >> BITS, 0, COLUMNS, key0, key1)
        column = _column(seeds.to(tl.uint32), w0, w1, w2, w3, BITS, S0, S1, S2)
        picked = tl.gather(values, (column & (STRETCH - 1)).to(tl.int32), 0)
        sums += tl.where(_odd(_part(start, BITS) & (column >> 12)), -picked, picked).to(tl.float64)
    tl.store(partial + group * size + seeds, sums, mask=seeds < size)


@device_function
def _walsh_hadamard(x: tl.tensor) -> tl.tensor:
    """H x of float32 [STRETCH]."""
    for bit in tl.static_range(12):
        x = _butterfly(x, bit)
    return x


@device_function
def _butterfly(x: tl.tensor, BIT: tl.constexpr) -> tl.tensor:
    """The sums and differences of elements whose index differs in bit BIT.

    Each element needs its partner only, and gets it exactly, as the sum of both in 32-bit integers less itself: a
    reduction stays in registers or in a warp where it can.
    """
    pairs = tl.reshape(x, (STRETCH >> (BIT + 1), 2, 1 << BIT))
    bits = pairs.to(tl.int32, bitcast=True)
    partner = (tl.sum(bits, 1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    first = tl.arange(0, 2)[None, :, None] == 0
    return tl.reshape(tl.where(first, pairs + partner, partner - pairs), (STRETCH,))


@device_function
def _column(
    x: tl.tensor,
    w0: tl.tensor,
    w1: tl.tensor,
    w2: tl.tensor,
    w3: tl.tensor,
    BITS: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
) -> tl.tensor:
    """uint32: pi_t(x); w0 .. w3 are the words of tile t."""
    x = (x + w3) & ((1 << BITS) - 1)
    x = (x * (w0 | 1) + (w0 >> 16)) & ((1 << BITS) - 1)
    x ^= x >> S0
    x = (x * (w1 | 1) + (w1 >> 16)) & ((1 << BITS) - 1)
    x ^= x >> S1
    x = (x * (w2 | 1) + (w2 >> 16)) & ((1 << BITS) - 1)
    return x ^ (x >> S2)


@device_function
def _seed(
    x: tl.tensor,
    w0: tl.tensor,
    w1: tl.tensor,
    w2: tl.tensor,
    w3: tl.tensor,
    BITS: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
) -> tl.tensor:
    """uint32: the seed whose column is x, the steps of `_column` undone. Every shift is more than a third of BITS."""
    x = x ^ (x >> S2) ^ (x >> (2 * S2))
    x = ((x - (w2 >> 16)) * _inverse(w2 | 1)) & ((1 << BITS) - 1)
    x = x ^ (x >> S1) ^ (x >> (2 * S1))
    x = ((x - (w1 >> 16)) * _inverse(w1 | 1)) & ((1 << BITS) - 1)
    x = x ^ (x >> S0) ^ (x >> (2 * S0))
    x = ((x - (w0 >> 16)) * _inverse(w0 | 1)) & ((1 << BITS) - 1)
    return (x - w3) & ((1 << BITS) - 1)


@device_function
def _inverse(odd: tl.tensor) -> tl.tensor:
    """uint32: 1 / odd modulo 2^24, by Newton's iteration: an odd number is its own inverse in the low three bits."""
    x = odd
    for _ in tl.static_range(3):
        x = x * (2 - odd * x)
    return x


@device_function
def _part(start: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """uint32: which stretch of its tile starts at `start`: the high bits of its rows."""
    return ((start >> 12) & ((1 << (BITS - 12)) - 1)).to(tl.uint32)


@device_function
def _column_signs(column: tl.tensor, start: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """uint32 [STRETCH / 32]: the bits where the Walsh-Hadamard column is -1, for the rows from `start` on."""
    row = tl.arange(0, 32).to(tl.uint32)
    low = tl.sum(_odd(row & column).to(tl.int32) << tl.arange(0, 32), 0).to(tl.uint32)
    word = _part(start, BITS) * (STRETCH // 32) + tl.arange(0, STRETCH // 32).to(tl.uint32)
    return tl.where(_odd(word & (column >> 5)), low ^ 0xFFFFFFFF, low)


@device_function
def _odd(x: tl.tensor) -> tl.tensor:
    """bool: whether the number of set bits is odd, of numbers below 2^16."""
    x ^= x >> 8
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    return (x & 1) != 0
