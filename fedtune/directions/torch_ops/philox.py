"""Philox4x32-10 in torch operations: the numbers of `fedtune.philox` as int64, and the signs that are made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedtune.philox import MASK32, MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

BLOCK = 128
"""Signs that one block of four words makes."""


def random_planes(blocks: Tensor, seeds: Tensor, purpose: int, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words 0 .. 3, each int64 in 0 .. 2^32 - 1: the blocks with counters (block, seed, purpose).

    `blocks` and `seeds` are int64; the words have the shape that the two broadcast to.
    """
    c0, c1, c2, c3 = blocks & MASK32, blocks >> 32, seeds, torch.full_like(blocks, purpose)
    a, b = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIER_0)
        high1, low1 = _product(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ a, low1, high0 ^ c3 ^ b, low0
        a, b = (a + WEYL_0) & MASK32, (b + WEYL_1) & MASK32
    return c0, c1, c2, c3


def minus(first: int, count: int, k: int, purpose: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """bool [BLOCK * count]: where the sign is -1 in the blocks `first` on: bit 32 * w + b of a block is bit b of word w."""
    blocks = torch.arange(first, first + count, device=device)
    planes = random_planes(blocks, torch.tensor(k, device=device), purpose, key)
    shifts = torch.arange(0, 32, 8, device=device)
    bytes_ = ((torch.stack(planes, dim=-1)[..., None] >> shifts) & 0xFF).to(torch.uint8)
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
    return ((bytes_[..., None] & bits) != 0).view(-1)


def signs(negative: Tensor) -> Tensor:
    """float32: -1 where `negative`, else 1."""
    return negative.to(torch.float32) * -2.0 + 1.0


def _product(c: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of c * multiplier, by halves of the multiplier: nothing overflows int64."""
    low = c * (multiplier & 0xFFFF)
    high = c * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
