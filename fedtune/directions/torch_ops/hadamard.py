"""Family hadamard in torch operations: one fast Walsh-Hadamard transform a tile, of all tiles of a run at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedtune.directions.base import F32, F64, Pool
from fedtune.directions.counters import COLUMNS, SIGNS, column_shifts, pool_key, tile_bits
from fedtune.directions.torch_ops.philox import BLOCK, minus, random_planes, signs
from fedtune.directions.torch_ops.rule import I64, Rule, whole
from fedtune.directions.torch_ops.sums import ordered_sum, wide


class Hadamard(Rule):
    """z_k[p] = D[p] * H[p mod n, pi_t(k)] in tiles t of n = 2^bits positions."""

    def __init__(self, pool: Pool) -> None:
        self._key, self._bits = pool_key(pool), tile_bits(pool.size)

    def direction(self, p: int, length: int, k: int, device: torch.device) -> Tensor:
        first, count, start = self._tiles(p, length)
        columns = self._columns(first, count, np.array([k]), device)
        negative = self._minus(first, count, device) ^ _column_minus(columns, self._bits)
        return signs(negative.view(-1)[start : start + length])

    def combined(self, p: int, length: int, coefficients: F32, device: torch.device) -> Tensor:
        first, count, start = self._tiles(p, length)
        columns = self._columns(first, count, np.arange(len(coefficients)), device)
        values = torch.zeros(count, 1 << self._bits, dtype=torch.float32, device=device)
        # Added to zero, so that a coefficient of -0 leaves no -0; a tile's columns are distinct, so nothing is summed here.
        values.scatter_(1, columns, (torch.from_numpy(coefficients).to(device) + 0.0).expand(count, -1))
        values = walsh_hadamard(values)
        flipped = torch.where(self._minus(first, count, device), -values, values)
        return flipped.view(-1)[start : start + length]

    def projected(self, delta: Tensor, p: int, seeds: I64) -> F64:
        values, first = whole(delta, p, 1 << self._bits)
        first, count = first >> self._bits, len(values)
        values = walsh_hadamard(torch.where(self._minus(first, count, delta.device), -values, values))
        picked = values.gather(1, self._columns(first, count, seeds, delta.device))
        total: F64 = ordered_sum(wide(picked).T).cpu().numpy()
        return total

    def _tiles(self, p: int, length: int) -> tuple[int, int, int]:
        """The first tile of a run, how many it touches, and where it starts in the first."""
        first, start = divmod(p, 1 << self._bits)
        return first, -(-(start + length) >> self._bits), start

    def _minus(self, first: int, count: int, device: torch.device) -> Tensor:
        """bool [count, n]: where D is -1."""
        blocks = (1 << self._bits) // BLOCK
        return minus(first * blocks, count * blocks, 0, SIGNS, self._key, device).view(count, -1)

    def _columns(self, first: int, count: int, seeds: I64, device: torch.device) -> Tensor:
        """int64 [count, len(seeds)]: pi_t(k)."""
        tiles = torch.arange(first, first + count, device=device)[:, None]
        w0, w1, w2, w3 = random_planes(tiles, torch.tensor(0, device=device), COLUMNS, self._key)
        mask = (1 << self._bits) - 1
        x = (torch.from_numpy(seeds).to(device)[None, :] + w3) & mask
        for word, shift in zip((w0, w1, w2), column_shifts(self._bits), strict=True):
            x = (x * (word | 1) + (word >> 16)) & mask
            x = x ^ (x >> shift)
        return x


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x for each row of float32 [rows, 2^b]."""
    rows, n = x.shape
    step = 1
    while step < n:
        a, b = x.view(rows, -1, 2, step).unbind(2)
        x = torch.stack((a + b, a - b), dim=2).view(rows, n)
        step *= 2
    return x


def _column_minus(columns: Tensor, bits: int) -> Tensor:
    """bool [tiles, n]: the rows where a Walsh-Hadamard column is -1, of int64 [tiles, 1]; row 32 h + l has a part of each."""
    high = torch.arange(1 << (bits - 5), device=columns.device)[None, :]
    low = torch.arange(32, device=columns.device)[None, :]
    apart = _odd(high & (columns >> 5))[:, :, None] ^ _odd(low & columns)[:, None, :]
    return apart.view(len(columns), -1)


def _odd(x: Tensor) -> Tensor:
    """bool: whether the number of set bits is odd, of numbers below 2^16."""
    for shift in (8, 4, 2, 1):
        x = x ^ (x >> shift)
    return (x & 1) != 0
