"""Family gaussian on the CPU: independent N(0, 1) for every seed and position, by Box-Muller in our own float32 arithmetic.

The logarithm, sine and cosine are polynomials from S. L. Moshier's Cephes library (single precision: logf.c, sinf.c,
cosf.c), without branches, so that they run in vector registers and give the same bits whatever the C library. Only
correctly rounded operations occur: +, -, *, square root, conversions. Values are within 1e-6 of the exact transform where
the radius of the pair is above 0.05 (99.9 % of them) and within 3e-4 anywhere; the largest is sqrt(2 ln 2^33) = 6.76.

Runs are worked off in stretches of 1024 positions that start at multiples of 1024, so the order of every sum is fixed by
the positions. Within a stretch the normals stand in planes: plane m has those of the positions 4 j + m. `key` is int64 [2],
the key words of the pool.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from fedtune.directions.counters import GAUSSIAN
from fedtune.directions.cpu.compiled import instructions, kernel
from fedtune.directions.cpu.signs import copy_unless_same
from fedtune.directions.cpu.stretch import BLOCKS, GROUP, STRETCH, begin, seed_words
from fedtune.directions.cpu.vectors import INT64, Vectors, load, places, repeat

LANES = 8
F = np.float32
ROOT_HALF_BITS = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
TURN_STEP = F(2.0 * np.pi / 2**32)
# ln(1 + x) = x - x^2 / 2 + x^3 * P(x) for 1 + x in [sqrt(1/2), sqrt(2)); ln 2 in two parts, the first exact in products
P = [F(c) for c in (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1)]
P += [F(c) for c in (-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)]
LN2_HIGH, LN2_LOW = F(0.693359375), F(-2.12194440e-4)
# sin x = x + x^3 * S(x^2) and cos x = 1 - x^2 / 2 + x^4 * C(x^2) for x in [-pi/4, pi/4]
S0, S1, S2 = F(-1.9515295891e-4), F(8.3321608736e-3), F(-1.6666654611e-1)
C0, C1, C2 = F(2.443315711809948e-5), F(-1.388731625493765e-3), F(4.166664568298827e-2)
HALF, ONE, MINUS_TWO, SCALE = F(0.5), F(1.0), F(-2.0), F(2.0**-32)


@kernel
def add(out: Any, base: Any, p0: int, k: int, c: Any, key: Any) -> None:
    """out[i] = base[i] + c * z_k[p0 + i], one product and one sum each."""
    scale = np.float32(c)
    tables, words, planes, normals = scratch()
    done = 0
    while done < out.shape[0]:
        p = p0 + done
        size = min(STRETCH - p % STRETCH, out.shape[0] - done)
        first, count = blocks_of(p, size)
        begin(tables, first, count, GAUSSIAN, key)
        seed_words(words, tables, first, count, k, key)
        normal_planes(planes, words, count)
        interleave(normals, planes, count)
        z = normals[p & 3 : (p & 3) + size]
        run = out[done : done + size]
        copy_unless_same(run, base[done : done + size])
        for i in range(size):
            run[i] += scale * z[i]
        done += size


@kernel
def combine(out: Any, base: Any, p0: int, coefficients: Any, key: Any) -> None:
    """out[i] = base[i] + sum_k coefficients[k] * z_k[p0 + i], k ascending; seeds with coefficient 0 cost nothing."""
    tables, words, sums, joined = scratch()
    done = 0
    while done < out.shape[0]:
        p = p0 + done
        size = min(STRETCH - p % STRETCH, out.shape[0] - done)
        first, count = blocks_of(p, size)
        begin(tables, first, count, GAUSSIAN, key)
        sums[:] = np.float32(0.0)
        for k in range(coefficients.shape[0]):
            if coefficients[k] != 0.0:
                seed_words(words, tables, first, count, k, key)
                for j in range(0, count, GROUP):
                    _add_normals(sums, words, j, coefficients[k])
        interleave(joined, sums, count)
        part = joined[p & 3 : (p & 3) + size]
        run = out[done : done + size]
        copy_unless_same(run, base[done : done + size])
        for i in range(size):
            run[i] += part[i]
        done += size


@kernel
def project(sums: Any, delta: Any, p0: int, wanted: Any, key: Any) -> None:
    """sums[k] += sum_i delta[i] * z_k[p0 + i] for every k in `wanted` (int64, the seeds' numbers).

    float32 within a stretch: 32 partial sums over every sixteenth block of four positions, counted from the first of the
    stretch that the run has, for its first and its second pair; these, in order, and the stretches are added in float64.
    """
    tables, words, values, apart = scratch()
    lanes = np.empty(2 * GROUP, np.float32)
    done = 0
    while done < delta.shape[0]:
        p = p0 + done
        size = min(STRETCH - p % STRETCH, delta.shape[0] - done)
        first, count = blocks_of(p, size)
        begin(tables, first, count, GAUSSIAN, key)
        apart[:] = np.float32(0.0)
        apart[p & 3 : (p & 3) + size] = delta[done : done + size]
        for j in range(count):
            for m in range(4):
                values[m, j] = apart[4 * j + m]
        for k in wanted:
            seed_words(words, tables, first, count, k, key)
            lanes[:] = np.float32(0.0)
            for j in range(0, count, GROUP):
                _dot_normals(lanes, values, words, j)
            total = 0.0
            for i in range(2 * GROUP):
                total += np.float64(lanes[i])
            sums[k] += total
        done += size


@kernel
def scratch() -> Any:
    """tables uint64 [2, BLOCKS], words uint32 [4, BLOCKS], planes float32 [4, BLOCKS], a stretch float32 [STRETCH]."""
    tables, words = np.empty((2, BLOCKS), np.uint64), np.empty((4, BLOCKS), np.uint32)
    return tables, words, np.empty((4, BLOCKS), np.float32), np.empty(STRETCH, np.float32)


@kernel
def blocks_of(p: int, size: int) -> Any:
    """The first block of four positions of a run within a stretch, and how many to work on: whole groups."""
    first = p >> 2
    return first, (((p + size + 3) >> 2) - first + GROUP - 1) // GROUP * GROUP


@kernel
def normal_planes(planes: Any, words: Any, count: int) -> None:
    """planes float32 [4, BLOCKS]: the normals that the words of `count` blocks make, in whole groups."""
    for j in range(0, count, GROUP):
        _write_normals(planes, words, j)


@kernel
def interleave(normals: Any, planes: Any, count: int) -> None:
    """normals[4 j + m] = planes[m, j] for j < count."""
    for j in range(count):
        normals[4 * j] = planes[0, j]
        normals[4 * j + 1] = planes[1, j]
        normals[4 * j + 2] = planes[2, j]
        normals[4 * j + 3] = planes[3, j]


@instructions
def _write_normals(typing: Any, planes: Any, words: Any, j: Any) -> Any:
    """planes[:, j : j + GROUP] = the normals of words[:, j : j + GROUP]."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        even, odd = _places(context, builder, signature.args[0], arguments[0], arguments[2])
        a, b = _box_muller(*_words(context, builder, signature.args[1], *arguments[1:]))
        a.store(even)
        b.store(odd)
        return context.get_dummy_value()

    return types.void(planes, words, types.int64), build


@instructions
def _add_normals(typing: Any, sums: Any, words: Any, j: Any, c: Any) -> Any:
    """sums[:, j : j + GROUP] += c * the normals of words[:, j : j + GROUP], one product and one sum each."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, words, j, c = arguments
        even, odd = _places(context, builder, signature.args[0], sums, j)
        a, b = _box_muller(*_words(context, builder, signature.args[1], words, j))
        scale = repeat(builder, c, LANES, len(even))
        (load(builder, even) + a * scale).store(even)
        (load(builder, odd) + b * scale).store(odd)
        return context.get_dummy_value()

    return types.void(sums, words, types.int64, types.float32), build


@instructions
def _dot_normals(typing: Any, lanes: Any, values: Any, words: Any, j: Any) -> Any:
    """lanes float32 [2 * GROUP] += values * normals of words[:, j : j + GROUP]: planes 0, then 1 to the first half, planes
    2, then 3 to the second, block j + i to lane i."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes, values, words, j = arguments
        starts = [ir.Constant(INT64, LANES * i) for i in range(4)]
        totals = places(context, builder, signature.args[0], lanes, starts, LANES)
        even, odd = _places(context, builder, signature.args[1], values, j)
        a, b = _box_muller(*_words(context, builder, signature.args[2], words, j))
        (load(builder, totals) + a * load(builder, even) + b * load(builder, odd)).store(totals)
        return context.get_dummy_value()

    return types.void(lanes, values, words, types.int64), build


def _places(context: Any, builder: Any, kind: Any, array: Any, j: Any) -> tuple[list[Any], list[Any]]:
    """Where GROUP blocks from j on stand in the planes 0 and 2, and in the planes 1 and 3."""
    starts = [[m * BLOCKS + offset for m in planes for offset in (0, LANES)] for planes in ((0, 2), (1, 3))]
    even, odd = ([builder.add(j, ir.Constant(INT64, start)) for start in half] for half in starts)
    return places(context, builder, kind, array, even, LANES), places(context, builder, kind, array, odd, LANES)


def _words(context: Any, builder: Any, kind: Any, words: Any, j: Any) -> tuple[Vectors, Vectors]:
    """The words that make the radii and those that make the angles."""
    radii, turns = _places(context, builder, kind, words, j)
    return load(builder, radii), load(builder, turns)


def _box_muller(radii: Vectors, turns: Vectors) -> tuple[Vectors, Vectors]:
    """The pairs of normals that words make. An angle is its distance from the nearest quarter turn, whose number is in the
    two highest bits of `quarter`; the distance in quarter turns is in the low 30 bits, with a sign."""
    radius = (_log((radii.rounded(signed=False) + HALF) * SCALE) * MINUS_TWO).root()
    quarter = turns + 0x20000000
    x = (turns << 2).rounded(signed=True) * (TURN_STEP * F(0.25))
    sine, cosine = _sine(x), _cosine(x)
    odd = quarter << 1
    a, b = odd.choose(sine, cosine), odd.choose(cosine, sine)
    return _negate(radius * a, quarter ^ odd), _negate(radius * b, quarter)


def _negate(x: Vectors, where: Vectors) -> Vectors:
    """-x where the highest bit is set."""
    return (x.as_bits() ^ (where & 0x80000000)).as_floats()


def _log(u: Vectors) -> Vectors:
    """ln u for normal positive floats (Cephes logf.c)."""
    bits = u.as_bits()
    exponent = (bits - ROOT_HALF_BITS).signed_shift(23)
    x = (bits - (exponent << 23)).as_floats() - ONE
    e = exponent.rounded(signed=True)
    z = x * x
    y = x * P[0]
    for coefficient in P[1:-1]:
        y = (y + coefficient) * x
    y = (y + P[-1]) * x * z
    y = y + e * LN2_LOW
    y = y - z * HALF
    return (x + y) + e * LN2_HIGH


def _sine(x: Vectors) -> Vectors:
    """sin x for x in [-pi/4, pi/4] (Cephes sinf.c)."""
    z = x * x
    return ((z * S0 + S1) * z + S2) * z * x + x


def _cosine(x: Vectors) -> Vectors:
    """cos x for x in [-pi/4, pi/4] (Cephes cosf.c)."""
    z = x * x
    return ((z * C0 + C1) * z + C2) * z * z - z * HALF + ONE
