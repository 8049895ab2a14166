"""Cuts a tensor into parts that stay in a core's cache, for whoever needs something in float32 beside it.

A temporary as large as the tensor would be given fresh memory each time, whose pages cost the system more than the
arithmetic on them. That of a part stays in the cache, in memory that is used again.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType

import torch
from torch import Tensor

Where = slice | EllipsisType
"""A part of a tensor along its first dimension, or all of it."""

CACHED = 1 << 16  # elements for each thread of a part on the CPU: 256 KiB of float32, of a few such a step
ON_GPU = 1 << 22  # elements of a part on a GPU, where every operation on one costs a launch


def cuts(tensor: Tensor, size: int = 0) -> Iterator[tuple[int, Where]]:
    """(offset of its first element, part) of a tensor along its first dimension, in order.

    Args:
        tensor: of any shape and strides.
        size: elements of a part, about; 0: what the tensor's device works on best.
    """
    size = size or (CACHED * torch.get_num_threads() if tensor.is_cpu else ON_GPU)
    if tensor.dim() == 0 or tensor.numel() <= size:  # most tensors of adapters: nothing to cut
        yield 0, ...
        return
    row = tensor[0].numel()
    step = max(1, size // max(1, row))
    for a in range(0, len(tensor), step):
        yield a * row, slice(a, a + step)
