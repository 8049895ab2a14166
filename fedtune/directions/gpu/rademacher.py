"""Family rademacher in Triton: an independent random sign for every seed and position, 128 from each Philox block."""

from __future__ import annotations

import triton.language as tl

from fedtune.directions import counters
from fedtune.directions.gpu.compiled import kernel
from fedtune.directions.gpu.philox import STRETCH, is_set, sign_words
from fedtune.directions.gpu.stretch import read, rounded, start_of, write

RADEMACHER = tl.constexpr(counters.RADEMACHER)


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
) -> None:
    """out[i] = base[i] + c * z_k[p0 + i]."""
    start = start_of(tl.program_id(0), p0)
    minus = is_set(sign_words(start, k, RADEMACHER, key0, key1))
    write(out, read(base, start, p0, length) + tl.where(minus, -c, c), start, p0, length)


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
) -> None:
    """weight[i] += c1 * z_k1[p0 + i], rounded to its type, then out[i] = weight[i] + c2 * z_k2[p0 + i]."""
    start = start_of(tl.program_id(0), p0)
    moved = read(weight, start, p0, length) + tl.where(is_set(sign_words(start, k1, RADEMACHER, key0, key1)), -c1, c1)
    write(weight, moved, start, p0, length)
    minus = is_set(sign_words(start, k2, RADEMACHER, key0, key1))
    write(out, rounded(weight, moved).to(tl.float32) + tl.where(minus, -c2, c2), start, p0, length)


@kernel
def combine(
    out: tl.tensor,
    base: tl.tensor,
    seeds: tl.tensor,
    coefficients: tl.tensor,
    count: tl.tensor,
    p0: tl.tensor,
    length: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
) -> None:
    """out[i] = base[i] + sum_j coefficients[j] * z_{seeds[j]}[p0 + i], j ascending below `count`."""
    start = start_of(tl.program_id(0), p0)
    sums = tl.zeros((STRETCH,), tl.float32)
    for j in range(count):
        c = tl.load(coefficients + j)
        sums += tl.where(is_set(sign_words(start, tl.load(seeds + j), RADEMACHER, key0, key1)), -c, c)
    write(out, read(base, start, p0, length) + sums, start, p0, length)


@kernel
def project(
    partial: tl.tensor,
    delta: tl.tensor,
    seeds: tl.tensor,
    count: tl.tensor,
    p0: tl.tensor,
    length: tl.tensor,
    per_group: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    """partial[g, j] = sum of delta[i] * z_{seeds[j]}[p0 + i] over the `per_group` stretches of group g; float32 within a
    stretch, float64 over stretches, in order of position. Program (g, b) has the seeds b * WIDTH on."""
    group, first = tl.program_id(0), tl.program_id(1) * WIDTH
    lane = tl.arange(0, WIDTH)
    sums = tl.zeros((WIDTH,), tl.float64)
    for number in range(per_group):
        start = start_of(group * per_group + number, p0)
        values = read(delta, start, p0, length)
        for j in range(tl.minimum(count - first, WIDTH)):
            minus = is_set(sign_words(start, tl.load(seeds + first + j), RADEMACHER, key0, key1))
            product = tl.sum(tl.where(minus, -values, values), 0).to(tl.float64)
            sums += tl.where(lane == j, product, 0.0)
    tl.store(partial + group * count + first + lane, sums, mask=first + lane < count)
