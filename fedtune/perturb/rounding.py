"""Stochastic rounding of float32 to bfloat16 or float16: up or down with the chances that make the mean exact.

Position p has 16 random bits: number p mod 8 of block p div 8, words in order, the low half of each first.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fedtune.directions.counters import ROUNDING
from fedtune.directions.cpu.bfloat16 import narrow_stochastically
from fedtune.directions.host import as_array, bits_of, for_pieces, is_bfloat16, is_direct
from fedtune.directions.torch_ops.philox import random_planes
from fedtune.philox import MASK32

CHUNK = 1 << 20  # elements rounded at a time by torch: the temporaries of one chunk are some 30 MB
LARGEST = 0x7F7F0000  # bits of the largest bfloat16, as float32


def round_stochastically(out: Tensor, wide: Tensor, p0: int, draw: int, key: int) -> None:
    """out = `wide` rounded to one of the two neighbours in the dtype of `out`, E[out] = wide.

    In float16 the chances are within 2^-16 where a number is subnormal. What lies beyond the largest finite number stays
    as rounding to nearest has it.

    Args:
        out: bfloat16 or float16, any shape.
        wide: float32, the same shape.
        p0: position of the first element; draw: how often the tensor was rounded before; key: of 64 bits, the stream.
            The random numbers depend on these three only.
    """
    for_pieces(partial(_round_piece, draw, (key & MASK32, key >> 32)), wide, out, p0)


def _round_piece(draw: int, key: tuple[int, int], piece: tuple[Tensor, Tensor, int]) -> None:
    wide, out, p0 = piece
    if is_bfloat16(out) and is_direct(wide):
        narrow_stochastically(bits_of(out), as_array(wide), p0, draw, ROUNDING, *key)
        return
    rounded = _bfloat16 if out.dtype == torch.bfloat16 else _by_distance
    for a in range(0, len(wide), CHUNK):
        part = wide[a : a + CHUNK].contiguous()
        out[a : a + CHUNK] = rounded(part, out.dtype, _halves(p0 + a, len(part), draw, key, wide.device))


def _bfloat16(wide: Tensor, dtype: torch.dtype, halves: Tensor) -> Tensor:
    """A carry from the 16 bits that are cut off goes up with their share of 2^16, which is the distance."""
    bits = wide.view(torch.int32)
    up = ((bits + halves.to(torch.int32)) >> 16).to(torch.int16).view(dtype)
    return torch.where((bits & 0x7FFFFFFF) < LARGEST, up, wide.to(dtype))


def _by_distance(wide: Tensor, dtype: torch.dtype, halves: Tensor) -> Tensor:
    near = wide.to(dtype)
    rest = wide - near.float()
    bits = near.view(torch.int16)
    grows = (rest > 0) == (near > 0)  # the other neighbour lies farther from zero
    smallest = torch.where(rest > 0, 1, -32767).to(torch.int16)  # the bits of the least positive and negative number
    other = torch.where(near == 0, smallest, torch.where(grows, bits + 1, bits - 1)).view(dtype)
    gap = (other.float() - near.float()).abs()
    return torch.where((halves.float() * 2.0**-16 * gap < rest.abs()) & gap.isfinite(), other, near)


def _halves(p0: int, count: int, draw: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """int64 [count]: 16 random bits for each position."""
    blocks = torch.arange(p0 >> 3, (p0 + count + 7) >> 3, device=device)
    words = torch.stack(random_planes(blocks, torch.tensor(draw, device=device), ROUNDING, key), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).view(-1)[p0 & 7 :][:count]
