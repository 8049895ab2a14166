"""Logarithm, exponential and cosine in float64 that give the same bits on every machine.

Those of the C library and numpy differ in their last bits between machines (numpy takes other instructions on another CPU).
Here only +, -, *, / and moves of the exponent occur, which IEEE 754 rounds in one way, each as an operation of its own. Results
are within 1 unit in the last place of the exact value (cosine: within 2^-52).

Source: the polynomials of fdlibm 5.3 (e_log.c, e_exp.c, k_sin.c, k_cos.c), Copyright (C) 1993 by Sun Microsystems, Inc.
"Permission to use, copy, modify, and distribute this software is freely granted, provided that this notice is preserved."
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

SQRT_HALF = 0.7071067811865476
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # the first exact in products with exponents
LOG = (6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01,
       1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01)  # fmt: skip
EXP = (1.66666666666666019037e-01, -2.77777777770155933842e-03, 6.61375632143793436117e-05, -1.65339022054652515390e-06,
       4.13813679705723846039e-08)  # fmt: skip
SIN = (-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04, 2.75573137070700676789e-06,
       -2.50507602534068634195e-08, 1.58969099521155010221e-10)  # fmt: skip
COS = (4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05, -2.75573143513906633035e-07,
       2.08757232129817482790e-09, -1.13596475577881948265e-11)  # fmt: skip
SMALLEST = -800.0  # exp of it, and of anything below, is 0


def log(x: F64) -> F64:
    """ln x for positive, finite x.  x = 2^k (1 + f),  ln x = k ln 2 + ln(1 + f),  |f| below sqrt 2 - 1."""
    fraction, exponent = np.frexp(x)
    low = fraction < SQRT_HALF
    k = exponent - low.astype(exponent.dtype)
    f = np.where(low, 2.0 * fraction, fraction) - 1.0
    s = f / (2.0 + f)
    z = s * s
    half = 0.5 * f * f
    rest = s * (half + z * _polynomial(LOG, z))
    return np.asarray(k * LN2_HIGH - ((half - (rest + k * LN2_LOW)) - f))


def exp(x: F64) -> F64:
    """e^x for x up to 709; 0 where that is below the smallest float64.  x = k ln 2 + r,  e^x = 2^k e^r."""
    x = np.maximum(x, SMALLEST)
    k = np.rint(x / (LN2_HIGH + LN2_LOW))
    high, low = x - k * LN2_HIGH, k * LN2_LOW
    r = high - low
    t = r * r
    c = r - t * _polynomial(EXP, t)
    return np.asarray(np.ldexp(1.0 - ((low - (r * c) / (2.0 - c)) - high), k.astype(np.int32)))


def cosine_of_turns(turns: F64) -> F64:
    """cos(2 pi turns) for |turns| up to 2^50. The nearest quarter of a turn is taken off first, exactly."""
    quarter = np.rint(4.0 * turns)
    x = 2.0 * math.pi * (turns - 0.25 * quarter)
    z = x * x
    cosine = 1.0 - (0.5 * z - z * z * _polynomial(COS, z))
    sine = x + x * z * _polynomial(SIN, z)
    which = np.mod(quarter, 4.0)
    return np.asarray(np.where(which == 0.0, cosine, np.where(which == 1.0, -sine, np.where(which == 2.0, -cosine, sine))))


def _polynomial(coefficients: Sequence[float], x: F64) -> F64:
    """c_0 + c_1 x + c_2 x^2 + ..., from the highest power down."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = coefficient + x * value
    return value
