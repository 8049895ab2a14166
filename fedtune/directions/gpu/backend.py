"""The operations of a family on the tensors of a CUDA device: lays them out and runs the kernels, in place where it can.

Contiguous tensors are read and written once; others through a contiguous copy. The order of every sum is fixed by the
position and size of a tensor, never by the device or by when a program runs: a projection is summed by groups of
stretches, and the groups in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.directions.backends import Backend, Move
from fedtune.directions.base import F32, F64, Bools, Pool
from fedtune.directions.counters import column_shifts, pool_key, tile_bits
from fedtune.directions.gpu import gaussian, hadamard, rademacher
from fedtune.directions.gpu.compiled import launch, signed
from fedtune.directions.gpu.philox import STRETCH
from fedtune.directions.gpu.stretch import join

SIZE = STRETCH.value
MOST_GROUPS = 512  # of a projection: enough programs for any device, and MOST_GROUPS x K float64 of partial sums
SEEDS = 64  # that a program of the families whose cost grows with K projects on while it has a stretch at hand
JOINED = 128  # seeds whose groups one program sums


class TritonBackend(Backend):
    """The Triton kernels of the family of `pool`; of lowrank, the directions of vectors."""

    def __init__(self, pool: Pool) -> None:
        self._kernels = _Hadamard(pool) if pool.family == "hadamard" else _Independent(pool)

    def add(self, out: Tensor, base: Tensor, p0: int, k: int, c: float) -> None:
        with _Flat(out, base) as (target, source):
            if stretches := stretches_of(p0, len(target)):
                self._kernels.add(stretches, target, source, p0, k, float(np.float32(c)))

    def move_and_add(self, weight: Tensor, out: Tensor, p0: int, move: Move, add: Move) -> None:
        if not weight.is_contiguous():
            super().move_and_add(weight, out, p0, move, add)
            return
        with _Flat(out, weight) as (target, source):
            if stretches := stretches_of(p0, len(target)):
                steps = [(k, float(np.float32(c))) for k, c in (move, add)]
                self._kernels.move_and_add(stretches, source, target, p0, *steps)

    def combine(self, out: Tensor, base: Tensor, p0: int, coefficients: F32) -> None:
        with _Flat(out, base) as (target, source):
            if stretches := stretches_of(p0, len(target)):
                self._kernels.combine(stretches, target, source, p0, coefficients)

    def project(self, sums: F64, delta: Tensor, p0: int, wanted: Bools | None) -> None:
        row = delta.detach().reshape(-1)
        seeds = np.arange(len(sums)) if wanted is None else np.flatnonzero(wanted)
        stretches = stretches_of(p0, len(row))
        if stretches and len(seeds):
            sums[seeds] += self._kernels.project(_Groups(stretches), row, p0, seeds.astype(np.int32)).cpu().numpy()


class _Kernels(ABC):
    """A family's launches on contiguous 1-D tensors that are not empty; `stretches` is how many of them a tensor touches."""

    @abstractmethod
    def add(self, stretches: int, out: Tensor, base: Tensor, p0: int, k: int, c: float) -> None: ...

    @abstractmethod
    def move_and_add(self, stretches: int, weight: Tensor, out: Tensor, p0: int, move: Move, add: Move) -> None: ...

    @abstractmethod
    def combine(self, stretches: int, out: Tensor, base: Tensor, p0: int, coefficients: F32) -> None: ...

    @abstractmethod
    def project(self, groups: _Groups, delta: Tensor, p0: int, seeds: Any) -> Tensor:
        """float64 [len(seeds)] on the device; `seeds` int32, ascending."""


class _Hadamard(_Kernels):
    def __init__(self, pool: Pool) -> None:
        bits = tile_bits(pool.size)
        self._size = pool.size
        self._key = tuple(map(signed, pool_key(pool)))
        self._tile = dict(zip(("BITS", "S0", "S1", "S2"), (bits, *column_shifts(bits)), strict=True))
        self._width = min(SIZE, max(JOINED, 1 << (pool.size - 1).bit_length()))

    def add(self, stretches: int, out: Tensor, base: Tensor, p0: int, k: int, c: float) -> None:
        launch(hadamard.add, (stretches,), out.device, out, base, p0, len(out), k, c, *self._key, **self._tile)

    def move_and_add(self, stretches: int, weight: Tensor, out: Tensor, p0: int, move: Move, add: Move) -> None:
        arguments = (weight, out, p0, len(out), *move, *add, *self._key)
        launch(hadamard.move_and_add, (stretches,), out.device, *arguments, **self._tile)

    def combine(self, stretches: int, out: Tensor, base: Tensor, p0: int, coefficients: F32) -> None:
        values = torch.from_numpy(coefficients).to(out.device)
        arguments = (out, base, values, p0, len(out), self._size, *self._key)
        launch(hadamard.combine, (stretches,), out.device, *arguments, **self._tile)

    def project(self, groups: _Groups, delta: Tensor, p0: int, seeds: Any) -> Tensor:
        partial = groups.partial(self._size, delta.device)
        grid = (groups.count, -(-self._size // self._width))
        arguments = (partial, delta, p0, len(delta), groups.each, self._size, *self._key)
        launch(hadamard.project, grid, delta.device, *arguments, **self._tile, WIDTH=self._width)
        return _joined(partial)[torch.from_numpy(seeds).to(delta.device)]


class _Independent(_Kernels):
    """Families whose cost grows with the seeds that count."""

    def __init__(self, pool: Pool) -> None:
        self._key = tuple(map(signed, pool_key(pool)))
        self._family: Any = rademacher if pool.family == "rademacher" else gaussian

    def add(self, stretches: int, out: Tensor, base: Tensor, p0: int, k: int, c: float) -> None:
        launch(self._family.add, (stretches,), out.device, out, base, p0, len(out), k, c, *self._key)

    def move_and_add(self, stretches: int, weight: Tensor, out: Tensor, p0: int, move: Move, add: Move) -> None:
        arguments = (weight, out, p0, len(out), *move, *add, *self._key)
        launch(self._family.move_and_add, (stretches,), out.device, *arguments)

    def combine(self, stretches: int, out: Tensor, base: Tensor, p0: int, coefficients: F32) -> None:
        seeds = np.flatnonzero(coefficients)
        numbers = torch.from_numpy(seeds.astype(np.int32)).to(out.device)
        values = torch.from_numpy(coefficients[seeds]).to(out.device)
        arguments = (out, base, numbers, values, len(seeds), p0, len(out), *self._key)
        launch(self._family.combine, (stretches,), out.device, *arguments)

    def project(self, groups: _Groups, delta: Tensor, p0: int, seeds: Any) -> Tensor:
        partial = groups.partial(len(seeds), delta.device)
        numbers = torch.from_numpy(seeds).to(delta.device)
        grid = (groups.count, -(-len(seeds) // SEEDS))
        arguments = (partial, delta, numbers, len(seeds), p0, len(delta), groups.each, *self._key)
        launch(self._family.project, grid, delta.device, *arguments, WIDTH=SEEDS)
        return _joined(partial)


class _Groups:
    """How the stretches of a tensor are shared out for a projection: `count` groups of `each` stretches."""

    def __init__(self, stretches: int) -> None:
        self.each = -(-stretches // MOST_GROUPS)
        self.count = -(-stretches // self.each)

    def partial(self, seeds: int, device: torch.device) -> Tensor:
        return torch.empty(self.count, seeds, dtype=torch.float64, device=device)


class _Flat:
    """(out, base) as contiguous 1-D tensors; on leaving, a strided `out` gets its copy's values."""

    def __init__(self, out: Tensor, base: Tensor) -> None:
        self._out, self._base = out.detach(), base.detach()

    def __enter__(self) -> tuple[Tensor, Tensor]:
        direct = self._out.is_contiguous()
        self._target = self._out if direct else torch.empty_like(self._out, memory_format=torch.contiguous_format)
        return self._target.view(-1), self._base.contiguous().view(-1)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._target is not self._out:
            self._out.copy_(self._target)


def stretches_of(p0: int, length: int) -> int:
    """How many stretches the positions p0 .. p0 + length - 1 touch; 0 for an empty tensor."""
    return -(-(p0 + length) // SIZE) - p0 // SIZE if length else 0


def _joined(partial: Tensor) -> Tensor:
    """float64 [seeds]: the sum of the groups, in order."""
    groups, size = partial.shape
    sums = torch.empty(size, dtype=torch.float64, device=partial.device)
    launch(join, (-(-size // JOINED),), partial.device, sums, partial, groups, size, WIDTH=JOINED)
    return sums
