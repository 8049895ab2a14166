"""Family gaussian in Triton: the Box-Muller transform of `cpu/gaussian.py`, operation by operation, so the same values.

Products and sums are not fused (see compiled.py) and the square root is the correctly rounded one.
"""

from __future__ import annotations

import triton.language as tl

from fedtune.directions import counters
from fedtune.directions.cpu import gaussian as cpu
from fedtune.directions.gpu.compiled import device_function, kernel
from fedtune.directions.gpu.philox import STRETCH, interleave, random_planes
from fedtune.directions.gpu.stretch import read, rounded, start_of, write

GAUSSIAN = tl.constexpr(counters.GAUSSIAN)
ROOT_HALF_BITS, TURN_STEP = tl.constexpr(int(cpu.ROOT_HALF_BITS)), tl.constexpr(float(cpu.TURN_STEP))
P0, P1, P2, P3, P4, P5, P6, P7, P8 = (tl.constexpr(float(p)) for p in cpu.P)
LN2_HIGH, LN2_LOW = tl.constexpr(float(cpu.LN2_HIGH)), tl.constexpr(float(cpu.LN2_LOW))
S0, S1, S2 = (tl.constexpr(float(s)) for s in (cpu.S0, cpu.S1, cpu.S2))
C0, C1, C2 = (tl.constexpr(float(c)) for c in (cpu.C0, cpu.C1, cpu.C2))
SCALE = tl.constexpr(float(cpu.SCALE))


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
    """out[i] = base[i] + c * z_k[p0 + i], one product and one sum each."""
    start = start_of(tl.program_id(0), p0)
    write(out, read(base, start, p0, length) + c * direction(start, k, GAUSSIAN, key0, key1), start, p0, length)


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
    moved = read(weight, start, p0, length) + c1 * direction(start, k1, GAUSSIAN, key0, key1)
    write(weight, moved, start, p0, length)
    perturbed = rounded(weight, moved).to(tl.float32) + c2 * direction(start, k2, GAUSSIAN, key0, key1)
    write(out, perturbed, start, p0, length)


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
        sums += tl.load(coefficients + j) * direction(start, tl.load(seeds + j), GAUSSIAN, key0, key1)
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
            product = tl.sum(values * direction(start, tl.load(seeds + first + j), GAUSSIAN, key0, key1), 0).to(tl.float64)
            sums += tl.where(lane == j, product, 0.0)
    tl.store(partial + group * count + first + lane, sums, mask=first + lane < count)


@device_function
def direction(start: tl.tensor, k: tl.tensor, purpose: tl.tensor, key0: tl.tensor, key1: tl.tensor) -> tl.tensor:
    """float32 [STRETCH]: the normals of seed k from position `start` on, a multiple of STRETCH, of a counter domain."""
    x0, x1, x2, x3 = random_planes((start >> 2) + tl.arange(0, STRETCH // 4), k, purpose, key0, key1)
    a, b = _box_muller(x0, x1)
    c, d = _box_muller(x2, x3)
    return interleave(a, b, c, d)


@device_function
def _box_muller(word: tl.tensor, turn: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The pair of normals that two planes of random words make."""
    radius = tl.sqrt_rn(-2.0 * _log((word.to(tl.float32) + 0.5) * SCALE))
    quadrant = (turn + 0x20000000) >> 30
    x = (turn - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * TURN_STEP
    sine, cosine = _sine(x), _cosine(x)
    odd = (quadrant & 1) != 0
    a, b = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    a = tl.where(((quadrant + 1) & 2) != 0, -a, a)
    b = tl.where((quadrant & 2) != 0, -b, b)
    return radius * a, radius * b


@device_function
def _log(u: tl.tensor) -> tl.tensor:
    """ln u for a normal positive float32 (Cephes logf.c)."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - ROOT_HALF_BITS) >> 23
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    z = x * x
    y = P0 * x + P1
    y = y * x + P2
    y = y * x + P3
    y = y * x + P4
    y = y * x + P5
    y = y * x + P6
    y = y * x + P7
    y = (y * x + P8) * x * z
    y = y + LN2_LOW * e
    y = y - 0.5 * z
    return (x + y) + LN2_HIGH * e


@device_function
def _sine(x: tl.tensor) -> tl.tensor:
    """sin x for x in [-pi/4, pi/4] (Cephes sinf.c)."""
    z = x * x
    return ((S0 * z + S1) * z + S2) * z * x + x


@device_function
def _cosine(x: tl.tensor) -> tl.tensor:
    """cos x for x in [-pi/4, pi/4] (Cephes cosf.c)."""
    z = x * x
    return ((C0 * z + C1) * z + C2) * z * z - 0.5 * z + 1.0
