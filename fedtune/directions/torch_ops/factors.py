"""Factors of family lowrank in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from fedtune.directions.factors import Factor
from fedtune.directions.torch_ops.gaussian import normals


def fill(factor: Factor, device: torch.device) -> Tensor:
    """The factor, one of its ranks after another."""
    rows = torch.empty(len(factor.seeds), factor.rank, factor.length, dtype=torch.float32, device=device)
    scales = torch.from_numpy(factor.scales).to(device)[:, None]
    for j in range(factor.rank):
        p = factor.p0 + j * factor.stride
        z = normals(p, factor.length, factor.seeds.tolist(), factor.purpose, factor.key, device)
        torch.mul(scales, z, out=rows[:, j])
    return rows.view(-1, factor.length)
