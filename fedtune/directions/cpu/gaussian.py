"""Family gaussian on the CPU: independent N(0, 1) for every seed and position, by Box-Muller in our own float32 arithmetic.

The logarithm, sine and cosine are polynomials from S. L. Moshier's Cephes library (single precision: logf.c, sinf.c,
cosf.c), without branches, so that they run in vector registers and give the same bits whatever the C library. Only
correctly rounded operations occur: +, -, *, square root, conversions. Values are within 1e-6 of the exact transform where
the radius of the pair is above 0.05 (99.9 % of them) and within 3e-4 anywhere; the largest is sqrt(2 ln 2^33) = 6.76.

Runs are worked off in stretches of 4096 positions that start at multiples of 4096, so the order of every sum is fixed by
the positions. `key` is int64 [2], the key words of the pool.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedtune.directions.counters import GAUSSIAN
from fedtune.directions.cpu.compiled import kernel
from fedtune.directions.cpu.philox import random_planes
from fedtune.directions.cpu.signs import copy_unless_same

STRETCH = 4096
LANES = 32
F = np.float32
ROOT_HALF_BITS = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
TURN_STEP = F(2.0 * np.pi / 2**32)
# ln(1 + x) = x - x^2 / 2 + x^3 * P(x) for 1 + x in [sqrt(1/2), sqrt(2)); ln 2 in two parts, the first exact in products
P = [F(c) for c in (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1)]
P += [F(c) for c in (-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)]
P0, P1, P2, P3, P4, P5, P6, P7, P8 = P
LN2_HIGH, LN2_LOW = F(0.693359375), F(-2.12194440e-4)
# sin x = x + x^3 * S(x^2) and cos x = 1 - x^2 / 2 + x^4 * C(x^2) for x in [-pi/4, pi/4]
S0, S1, S2 = F(-1.9515295891e-4), F(8.3321608736e-3), F(-1.6666654611e-1)
C0, C1, C2 = F(2.443315711809948e-5), F(-1.388731625493765e-3), F(4.166664568298827e-2)
HALF, ONE, MINUS_TWO, SCALE = F(0.5), F(1.0), F(-2.0), F(2.0**-32)


@kernel
def add(out: Any, base: Any, p0: int, k: int, c: Any, key: Any) -> None:
    """out[i] = base[i] + c * z_k[p0 + i], one product and one sum each."""
    scale = np.float32(c)
    words, normals = np.empty((4, STRETCH >> 2), np.uint32), np.empty(STRETCH, np.float32)
    done = 0
    while done < out.shape[0]:
        p = p0 + done
        size = min(STRETCH - p % STRETCH, out.shape[0] - done)
        z = standard_normals(normals, words, p, size, k, GAUSSIAN, key)
        run = out[done : done + size]
        copy_unless_same(run, base[done : done + size])
        for i in range(size):
            run[i] += scale * z[i]
        done += size


@kernel
def combine(out: Any, base: Any, p0: int, coefficients: Any, key: Any) -> None:
    """out[i] = base[i] + sum_k coefficients[k] * z_k[p0 + i], k ascending; seeds with coefficient 0 cost nothing."""
    words, normals = np.empty((4, STRETCH >> 2), np.uint32), np.empty(STRETCH, np.float32)
    sums = np.empty(STRETCH, np.float32)
    done = 0
    while done < out.shape[0]:
        p = p0 + done
        size = min(STRETCH - p % STRETCH, out.shape[0] - done)
        part = sums[:size]
        part[:] = np.float32(0.0)
        for k in range(coefficients.shape[0]):
            if coefficients[k] != 0.0:
                z = standard_normals(normals, words, p, size, k, GAUSSIAN, key)
                for i in range(size):
                    part[i] += coefficients[k] * z[i]
        run = out[done : done + size]
        copy_unless_same(run, base[done : done + size])
        for i in range(size):
            run[i] += part[i]
        done += size


@kernel
def project(sums: Any, delta: Any, p0: int, wanted: Any, key: Any) -> None:
    """sums[k] += sum_i delta[i] * z_k[p0 + i] in float64, for every k in `wanted` (int64, the seeds' numbers)."""
    words, normals = np.empty((4, STRETCH >> 2), np.uint32), np.empty(STRETCH, np.float32)
    lanes = np.empty(LANES, np.float64)
    done = 0
    while done < delta.shape[0]:
        p = p0 + done
        size = min(STRETCH - p % STRETCH, delta.shape[0] - done)
        for k in wanted:
            z = standard_normals(normals, words, p, size, k, GAUSSIAN, key)
            sums[k] += _dot(delta[done : done + size], z, lanes)
        done += size


@kernel
def _dot(x: Any, y: Any, lanes: Any) -> Any:
    """float64: sum of x * y (each product exact); element i adds to lane i mod 32, then the lanes are added in order."""
    lanes[:] = 0.0
    whole = x.shape[0] // LANES
    for j in range(whole):
        a, b = x[LANES * j : LANES * j + LANES], y[LANES * j : LANES * j + LANES]
        for i in range(LANES):
            lanes[i] += np.float64(a[i]) * np.float64(b[i])
    for i in range(x.shape[0] - LANES * whole):
        lanes[i] += np.float64(x[LANES * whole + i]) * np.float64(y[LANES * whole + i])
    total = 0.0
    for i in range(LANES):
        total += lanes[i]
    return total


@kernel
def standard_normals(normals: Any, words: Any, p: int, size: int, k: int, purpose: int, key: Any) -> Any:
    """float32 [size]: the normals of seed k from position p on, of a counter domain; fills and returns a part of `normals`.

    `normals` has room for the blocks of four that the positions lie in, `words` (uint32 [4, ...]) for their words.
    """
    first, last = p >> 2, (p + size + 3) >> 2
    count = last - first
    x0, x1, x2, x3 = words[0, :count], words[1, :count], words[2, :count], words[3, :count]
    random_planes(x0, x1, x2, x3, first, k, purpose, key[0], key[1])
    box_muller(normals[: 4 * count], x0, x1)
    box_muller(normals[2 : 4 * count], x2, x3)
    start = p & 3
    return normals[start : start + size]


@kernel
def box_muller(normals: Any, radii: Any, turns: Any) -> None:
    """normals[4 j] and normals[4 j + 1]: the pair that radii[j] and turns[j] (uint32) make."""
    for j in range(radii.shape[0]):
        radius = np.sqrt(MINUS_TWO * _log(_unit(radii[j])))
        turn = turns[j]
        quadrant = np.uint32(np.uint32(turn + np.uint32(0x20000000)) >> np.uint32(30))
        x = np.float32(np.int32(np.uint32(turn - np.uint32(quadrant << np.uint32(30))))) * TURN_STEP
        sine, cosine = _sine(x), _cosine(x)
        odd = quadrant & np.uint32(1) != 0
        a, b = sine if odd else cosine, cosine if odd else sine
        normals[4 * j] = radius * (-a if np.uint32(quadrant + np.uint32(1)) & np.uint32(2) != 0 else a)
        normals[4 * j + 1] = radius * (-b if quadrant & np.uint32(2) != 0 else b)


@kernel
def _unit(word: Any) -> Any:
    """float32 in (0, 1]: (word + 1/2) / 2^32."""
    return (np.float32(word) + HALF) * SCALE


@kernel
def _log(u: Any) -> Any:
    """ln u for a normal positive float32 (Cephes logf.c)."""
    bits = np.float32(u).view(np.int32)
    exponent = np.int32(np.int32(bits - ROOT_HALF_BITS) >> np.int32(23))
    x = np.int32(bits - np.int32(exponent << np.int32(23))).view(np.float32) - ONE
    e = np.float32(exponent)
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
    y = y - HALF * z
    return (x + y) + LN2_HIGH * e


@kernel
def _sine(x: Any) -> Any:
    """sin x for x in [-pi/4, pi/4] (Cephes sinf.c)."""
    z = x * x
    return ((S0 * z + S1) * z + S2) * z * x + x


@kernel
def _cosine(x: Any) -> Any:
    """cos x for x in [-pi/4, pi/4] (Cephes cosf.c)."""
    z = x * x
    return ((C0 * z + C1) * z + C2) * z * z - HALF * z + ONE
