"""What a family must do with a run of positions on a device, and the part that families of independent values share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtune.directions.base import F32, F64
from fedtune.directions.torch_ops.sums import ordered_sum, wide

I64 = npt.NDArray[np.int64]
STRETCH = 4096
"""Positions of a family of independent values whose products are summed in float32; starts at multiples of itself."""


class Rule(ABC):
    """A family on the run of positions p .. p + length - 1, which is not empty."""

    @abstractmethod
    def direction(self, p: int, length: int, k: int, device: torch.device) -> Tensor:
        """float32 [length]: z_k."""

    @abstractmethod
    def combined(self, p: int, length: int, coefficients: F32, device: torch.device) -> Tensor:
        """float32 [length]: sum_k coefficients[k] * z_k."""

    @abstractmethod
    def projected(self, delta: Tensor, p: int, seeds: I64) -> F64:
        """float64 [len(seeds)]: <z_k, delta> for each seed (one at least); delta is float32 [length]."""


class Independent(Rule):
    """Values that are independent from seed to seed: every seed that counts is drawn."""

    def combined(self, p: int, length: int, coefficients: F32, device: torch.device) -> Tensor:
        sums = torch.zeros(length, dtype=torch.float32, device=device)
        for k in np.flatnonzero(coefficients).tolist():
            sums += float(coefficients[k]) * self.direction(p, length, k, device)
        return sums

    def projected(self, delta: Tensor, p: int, seeds: I64) -> F64:
        values, first = whole(delta, p, STRETCH)
        stretches = []
        for k in seeds.tolist():
            z = self.direction(first, values.numel(), k, delta.device)
            stretches.append(ordered_sum(values * z.view_as(values)))
        total: F64 = ordered_sum(wide(torch.stack(stretches))).cpu().numpy()
        return total


def whole(delta: Tensor, p: int, size: int) -> tuple[Tensor, int]:
    """([n, size], first): delta in whole stretches of `size` positions from `first` on, zero where it has no element."""
    first = p // size * size
    count = -(-(p + len(delta)) // size) - first // size
    if p == first and len(delta) == count * size:
        return delta.view(count, size), first
    values = torch.zeros(count * size, dtype=torch.float32, device=delta.device)
    values[p - first : p - first + len(delta)] = delta
    return values.view(count, size), first
