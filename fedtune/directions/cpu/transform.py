"""The fast Walsh-Hadamard transform of one tile, laid out so that every pass runs over contiguous memory.

The transform commutes with any permutation of the bits of the index. So the high bits are done in place (butterflies at
distance 64 and more), and the low six by two passes of constant geometry (Pease, "An adaptation of the fast Fourier
transform for parallel processing", J. ACM 15, 1968) that read groups of eight and write eight planes, which turns the
index by three bits each. Whoever calls picks the turned index up where single elements are addressed anyway.
"""

from __future__ import annotations

from typing import Any

from fedtune.directions.cpu.compiled import kernel

TURN = 6
"""The output's index is the input's, rotated right by this many bits. A tile has at least 2^6 elements."""


@kernel
def walsh_hadamard(x: Any, spare: Any) -> None:
    """x = H x in place, then index i goes to i rotated right by TURN bits; x and spare are float32 [2^b], b >= 6."""
    n = x.shape[0]
    h = n
    while h >= 512:
        h >>= 3
        _radix8(x, h)
    if h == 256:
        h >>= 2
        _radix4(x, h)
    elif h == 128:
        h >>= 1
        _radix2(x, h)
    _planes8(spare, x)
    _planes8(x, spare)


@kernel
def _radix2(x: Any, h: int) -> None:
    for i in range(0, x.shape[0], 2 * h):
        a, b = x[i : i + h], x[i + h : i + 2 * h]
        for j in range(h):
            u, v = a[j], b[j]
            a[j], b[j] = u + v, u - v


@kernel
def _radix4(x: Any, h: int) -> None:
    for i in range(0, x.shape[0], 4 * h):
        a, b, c, d = x[i : i + h], x[i + h : i + 2 * h], x[i + 2 * h : i + 3 * h], x[i + 3 * h : i + 4 * h]
        for j in range(h):
            s, t, u, v = a[j] + b[j], a[j] - b[j], c[j] + d[j], c[j] - d[j]
            a[j], b[j], c[j], d[j] = s + u, t + v, s - u, t - v


@kernel
def _radix8(x: Any, h: int) -> None:
    for i in range(0, x.shape[0], 8 * h):
        a, b, c, d = x[i : i + h], x[i + h : i + 2 * h], x[i + 2 * h : i + 3 * h], x[i + 3 * h : i + 4 * h]
        e, f, g, k = x[i + 4 * h : i + 5 * h], x[i + 5 * h : i + 6 * h], x[i + 6 * h : i + 7 * h], x[i + 7 * h : i + 8 * h]
        for j in range(h):
            s, t, u, v = a[j] + b[j], a[j] - b[j], c[j] + d[j], c[j] - d[j]
            a0, a1, a2, a3 = s + u, t + v, s - u, t - v
            s, t, u, v = e[j] + f[j], e[j] - f[j], g[j] + k[j], g[j] - k[j]
            b0, b1, b2, b3 = s + u, t + v, s - u, t - v
            a[j], b[j], c[j], d[j] = a0 + b0, a1 + b1, a2 + b2, a3 + b3
            e[j], f[j], g[j], k[j] = a0 - b0, a1 - b1, a2 - b2, a3 - b3


@kernel
def _planes8(y: Any, x: Any) -> None:
    """Butterflies on the lowest three bits of the index of x, written with the index rotated right by three."""
    n = x.shape[0] >> 3
    a, b, c, d = y[:n], y[n : 2 * n], y[2 * n : 3 * n], y[3 * n : 4 * n]
    e, f, g, k = y[4 * n : 5 * n], y[5 * n : 6 * n], y[6 * n : 7 * n], y[7 * n : 8 * n]
    for j in range(n):
        s, t = x[8 * j] + x[8 * j + 1], x[8 * j] - x[8 * j + 1]
        u, v = x[8 * j + 2] + x[8 * j + 3], x[8 * j + 2] - x[8 * j + 3]
        a0, a1, a2, a3 = s + u, t + v, s - u, t - v
        s, t = x[8 * j + 4] + x[8 * j + 5], x[8 * j + 4] - x[8 * j + 5]
        u, v = x[8 * j + 6] + x[8 * j + 7], x[8 * j + 6] - x[8 * j + 7]
        b0, b1, b2, b3 = s + u, t + v, s - u, t - v
        a[j], b[j], c[j], d[j] = a0 + b0, a1 + b1, a2 + b2, a3 + b3
        e[j], f[j], g[j], k[j] = a0 - b0, a1 - b1, a2 - b2, a3 - b3
