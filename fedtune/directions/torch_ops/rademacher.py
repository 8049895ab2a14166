"""Family rademacher in torch operations: an independent random sign for every seed and position."""

from __future__ import annotations

import torch
from torch import Tensor

from fedtune.directions.base import Pool
from fedtune.directions.counters import RADEMACHER, pool_key
from fedtune.directions.torch_ops.philox import BLOCK, minus, signs
from fedtune.directions.torch_ops.rule import Independent


class Rademacher(Independent):
    """128 signs from each block of random words."""

    def __init__(self, pool: Pool) -> None:
        self._key = pool_key(pool)

    def direction(self, p: int, length: int, k: int, device: torch.device) -> Tensor:
        first, start = divmod(p, BLOCK)
        negative = minus(first, -(-(start + length) // BLOCK), k, RADEMACHER, self._key, device)
        return signs(negative[start : start + length])
