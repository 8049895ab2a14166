"""Family gaussian in torch operations: the Box-Muller transform of `cpu/gaussian.py`, operation by operation.

Torch runs each operation by itself, so products and sums are not fused and the values are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtune.directions.base import Pool
from fedtune.directions.counters import GAUSSIAN, pool_key
from fedtune.directions.cpu import gaussian as cpu
from fedtune.directions.torch_ops.philox import random_planes
from fedtune.directions.torch_ops.rule import Independent
from fedtune.directions.torch_ops.sums import wide

ROOT_HALF_BITS, TURN_STEP, SCALE = int(cpu.ROOT_HALF_BITS), float(cpu.TURN_STEP), float(cpu.SCALE)
P0, *P = (float(p) for p in cpu.P)
LN2_HIGH, LN2_LOW = float(cpu.LN2_HIGH), float(cpu.LN2_LOW)
S0, S1, S2 = (float(s) for s in (cpu.S0, cpu.S1, cpu.S2))
C0, C1, C2 = (float(c) for c in (cpu.C0, cpu.C1, cpu.C2))


class Gaussian(Independent):
    """Four normals from each block of random words."""

    def __init__(self, pool: Pool) -> None:
        self._key = pool_key(pool)

    def direction(self, p: int, length: int, k: int, device: torch.device) -> Tensor:
        return normals(p, length, [k], GAUSSIAN, self._key, device)[0]


def normals(p: int, length: int, seeds: Sequence[int], purpose: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """float32 [len(seeds), length]: the normals of each seed from position p on, of a counter domain."""
    first, start = divmod(p, 4)
    blocks = torch.arange(first, first + (start + length + 3) // 4, device=device)
    x0, x1, x2, x3 = random_planes(blocks[None, :], torch.tensor(seeds, device=device)[:, None], purpose, key)
    pairs = (*_box_muller(x0, x1), *_box_muller(x2, x3))
    return torch.stack(pairs, dim=-1).view(len(seeds), -1)[:, start : start + length]


def _box_muller(word: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of normals that two planes of random words make. Quadrant 4 is 0 again: only its low bits are looked at."""
    radius = _root(_log((word.to(torch.float32) + 0.5) * SCALE) * -2.0)
    quadrant = (turn + 0x20000000) >> 30
    x = (turn - (quadrant << 30)).to(torch.float32) * TURN_STEP
    sine, cosine = _sine(x), _cosine(x)
    odd = (quadrant & 1) != 0
    a, b = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    a = torch.where(((quadrant + 1) & 2) != 0, -a, a)
    b = torch.where((quadrant & 2) != 0, -b, b)
    return radius * a, radius * b


def _root(x: Tensor) -> Tensor:
    """The square root, correctly rounded by way of float64: torch's own in float32 is not, where it uses MKL."""
    return torch.sqrt(wide(x)).to(device=x.device, dtype=torch.float32)


def _log(u: Tensor) -> Tensor:
    """ln u for a normal positive float32 (Cephes logf.c)."""
    bits = u.view(torch.int32)
    exponent = (bits - ROOT_HALF_BITS) >> 23
    x = (bits - exponent * (1 << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    z = x * x
    y = x * P0 + P[0]
    for coefficient in P[1:]:
        y = y * x + coefficient
    y = y * x * z
    y = y + e * LN2_LOW
    y = y - z * 0.5
    return (x + y) + e * LN2_HIGH


def _sine(x: Tensor) -> Tensor:
    """sin x for x in [-pi/4, pi/4] (Cephes sinf.c)."""
    z = x * x
    return ((z * S0 + S1) * z + S2) * z * x + x


def _cosine(x: Tensor) -> Tensor:
    """cos x for x in [-pi/4, pi/4] (Cephes cosf.c)."""
    z = x * x
    return ((z * C0 + C1) * z + C2) * z * z - z * 0.5 + 1.0
