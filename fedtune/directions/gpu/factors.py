"""Factors of family lowrank in Triton: normals of a counter domain laid out as rows of a matrix, all in one launch."""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from fedtune.directions.factors import Factor
from fedtune.directions.gpu.backend import stretches_of
from fedtune.directions.gpu.compiled import kernel, launch, signed
from fedtune.directions.gpu.gaussian import direction
from fedtune.directions.gpu.stretch import start_of, write


@kernel
def fill_rows(
    out: tl.tensor,
    seeds: tl.tensor,
    scales: tl.tensor,
    p0: tl.tensor,
    stride: tl.tensor,
    length: tl.tensor,
    rank: tl.tensor,
    purpose: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
) -> None:
    """out[row, i] = scales[q] * the normal of seeds[q] at position p0 + j * stride + i; row = q * rank + j."""
    row = tl.program_id(0)
    first = p0 + (row % rank).to(tl.int64) * stride
    start = start_of(tl.program_id(1), first)
    z = tl.load(scales + row // rank) * direction(start, tl.load(seeds + row // rank), purpose, key0, key1)
    write(out + row.to(tl.int64) * length, z, start, first, length)


def fill(factor: Factor, device: torch.device) -> Tensor:
    """The factor, by one program for each row and stretch of positions."""
    rows = torch.empty(len(factor.seeds) * factor.rank, factor.length, dtype=torch.float32, device=device)
    if not rows.numel():
        return rows
    seeds = torch.from_numpy(factor.seeds.astype(np.int32)).to(device)
    scales = torch.from_numpy(factor.scales).to(device)
    most = max(stretches_of(factor.p0 + j * factor.stride, factor.length) for j in range(factor.rank))
    numbers = (factor.p0, factor.stride, factor.length, factor.rank, factor.purpose)
    launch(fill_rows, (len(rows), most), device, rows, seeds, scales, *numbers, *map(signed, factor.key))
    return rows
