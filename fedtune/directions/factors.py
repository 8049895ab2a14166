"""Factors of family lowrank: which normals a factor is made of. `choice.py` picks the kernels that make it on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtune.directions.base import F32
from fedtune.directions.cpu import factors as cpu

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Factor:
    """float32 [len(seeds) * rank, length]: row (q, j) is scales[q] * the normals of seed seeds[q] at the positions
    p0 + j * stride + (0 .. length - 1) of the counter domain `purpose`.
    """

    purpose: int
    p0: int
    stride: int
    rank: int
    length: int
    seeds: I64
    scales: F32
    key: tuple[int, int]


Fill = Callable[[Factor, torch.device], Tensor]
"""Makes a factor on a device: the same bits, whichever way."""


def fill(factor: Factor, device: torch.device) -> Tensor:
    """The factor, by the kernels of the CPU."""
    rows = np.empty((len(factor.seeds) * factor.rank, factor.length), np.float32)
    key = np.array(factor.key, dtype=np.int64)
    cpu.fill(rows, factor.p0, factor.stride, factor.seeds, factor.scales, factor.purpose, key)
    return torch.from_numpy(rows).to(device)
