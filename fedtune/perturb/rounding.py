"""Stochastic rounding of float32 to bfloat16 or float16: up or down with the chances that make the mean exact."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedtune.directions.counters import ROUNDING
from fedtune.directions.cpu.philox import random_planes as cpu_words
from fedtune.directions.torch_ops.philox import random_planes as torch_words
from fedtune.philox import MASK32

CHUNK = 1 << 20  # elements rounded at a time: the temporaries of one chunk are some 20 MB


def round_stochastically(out: Tensor, wide: Tensor, p0: int, draw: int, key: int) -> None:
    """out = `wide` rounded to one of the two neighbours in the dtype of `out`, E[out] = wide.

    What lies beyond the largest finite number stays as rounding to nearest has it.

    Args:
        out: bfloat16 or float16, any shape.
        wide: float32, the same shape.
        p0: position of the first element; draw: how often the tensor was rounded before; key: of 64 bits, the stream.
            The random numbers depend on these three only.
    """
    if out.is_contiguous():
        source, target = wide.reshape(-1), out.view(-1)
        for a in range(0, len(source), CHUNK):
            part = source[a : a + CHUNK]
            target[a : a + CHUNK] = _rounded(part, out.dtype, _uniforms(p0 + a, len(part), draw, key, out.device))
        return
    dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    round_stochastically(dense, wide, p0, draw, key)
    out.copy_(dense)


def _rounded(wide: Tensor, dtype: torch.dtype, uniforms: Tensor) -> Tensor:
    near = wide.to(dtype)
    rest = wide - near.float()
    bits = near.view(torch.int16)
    grows = (rest > 0) == (near > 0)  # the other neighbour lies farther from zero
    smallest = torch.where(rest > 0, 1, -32767).to(torch.int16)  # the bits of the least positive and negative number
    other = torch.where(near == 0, smallest, torch.where(grows, bits + 1, bits - 1)).view(dtype)
    gap = (other.float() - near.float()).abs()
    return torch.where((uniforms * gap < rest.abs()) & gap.isfinite(), other, near)


def _uniforms(p0: int, count: int, draw: int, key: int, device: torch.device) -> Tensor:
    """float32 [count] in [0, 1): 24 bits of the random word at each position."""
    first, last = p0 >> 2, (p0 + count + 3) >> 2
    if device.type == "cpu":
        planes = np.empty((4, last - first), np.uint32)
        cpu_words(planes[0], planes[1], planes[2], planes[3], first, draw, ROUNDING, key & MASK32, key >> 32)
        words = torch.from_numpy(planes.astype(np.int64))
    else:
        blocks, seed = torch.arange(first, last, device=device), torch.tensor(draw, device=device)
        words = torch.stack(torch_words(blocks, seed, ROUNDING, (key & MASK32, key >> 32)))
    return (words.T.reshape(-1)[p0 & 3 :][:count] >> 8).float() * 2.0**-24
