"""The operations of a family on tensors of any device, by torch operations there, in pieces of bounded scratch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedtune.directions.backends import Backend
from fedtune.directions.base import F32, F64, Bools, Pool
from fedtune.directions.torch_ops.gaussian import Gaussian
from fedtune.directions.torch_ops.hadamard import Hadamard
from fedtune.directions.torch_ops.rademacher import Rademacher
from fedtune.directions.torch_ops.rule import Rule
from fedtune.layout import ALIGN

CHUNK = 64 * ALIGN
"""Elements that are worked on at a time: enough for a GPU; operations on them need some 200 MB of scratch."""

RULES: dict[str, type[Hadamard | Rademacher | Gaussian]] = {
    "hadamard": Hadamard,
    "rademacher": Rademacher,
    "gaussian": Gaussian,
    "lowrank": Gaussian,  # its vectors
}


class TorchBackend(Backend):
    """The family of `pool`; of lowrank, the directions of vectors."""

    def __init__(self, pool: Pool) -> None:
        self._rule: Rule = RULES[pool.family](pool)

    def add(self, out: Tensor, base: Tensor, p0: int, k: int, c: float) -> None:
        scale = float(np.float32(c))
        for offset, (source, target) in _pieces(base.detach(), out.detach()):
            z = self._rule.direction(p0 + offset, target.numel(), k, target.device)
            _write(target, source, z.mul_(scale))

    def combine(self, out: Tensor, base: Tensor, p0: int, coefficients: F32) -> None:
        for offset, (source, target) in _pieces(base.detach(), out.detach()):
            _write(target, source, self._rule.combined(p0 + offset, target.numel(), coefficients, target.device))

    def project(self, sums: F64, delta: Tensor, p0: int, wanted: Bools | None) -> None:
        seeds = np.arange(len(sums)) if wanted is None else np.flatnonzero(wanted)
        if not len(seeds):
            return
        for offset, (piece,) in _pieces(delta.detach()):
            sums[seeds] += self._rule.projected(piece.to(torch.float32).reshape(-1), p0 + offset, seeds)


def _write(target: Tensor, source: Tensor, change: Tensor) -> None:
    """target = round(float32(source) + change); `change` is flat."""
    target.copy_(source.to(device=target.device, dtype=torch.float32) + change.view(target.shape))


def _pieces(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """(offset, views of at most CHUNK elements) that cover tensors of one shape in the order of their elements.

    Those of contiguous tensors start at multiples of the largest tile, those of others where rows end.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    length, *rest = tensors[0].shape
    size = math.prod(rest)
    step = CHUNK // max(size, 1)
    for a in range(0, length, max(step, 1)):
        if step:
            yield a * size, tuple(tensor[a : a + step] for tensor in tensors)
        else:
            for offset, views in _pieces(*(tensor[a] for tensor in tensors)):
                yield a * size + offset, views
