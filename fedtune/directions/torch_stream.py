"""Families torch and torch-truncated: the directions that the official codes draw on the CPU. For parity only.

For a literal seed s torch's CPU generator is seeded with s (of which it uses the low 32 bits), then

torch             FedKSeed: one `torch.normal(0, 1)` is drawn per parameter, in order.
                  Source: zhenqincn/FedKSeed, optimizers/mezo_optimizer.py.
torch-truncated   Ferret: the generator is seeded anew for each block of parameters, and `torch.nn.init.trunc_normal_` in
                  [-1/sqrt(d), 1/sqrt(d)] draws the whole block of d elements. So blocks of equal size have equal values.
                  Source: allen4747/Ferret, optimizers/ferret_optimizer.py.

The values depend on torch's version, on tensor shapes and on their order, so nothing else uses these families.
`trunc_normal_` samples by rejection since torch 2.13; earlier versions draw other values from the same seed.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import numpy.typing as npt
import torch

from fedtune.directions.base import F32, F64, Family, Pool
from fedtune.errors import DirectionsError
from fedtune.layout import Layout
from fedtune.philox import MASK32
from fedtune.seeds import Stream

CANDIDATE_BOUND = 10**11  # the official codes draw candidate seeds below it


def candidate_seeds(pool: Pool) -> tuple[int, ...]:
    """The K literal seeds: the pool's own, or drawn from its seed."""
    if pool.candidates:
        return pool.candidates
    return tuple(int(s) for s in Stream(pool.seed, "candidates").below(CANDIDATE_BOUND, pool.size))


def truncated_normal(seed: int, size: int) -> torch.Tensor:
    """float32 [size]: Ferret's official basis vector of a block, each element within +-1/sqrt(size)."""
    bound = 1.0 / max(size, 1) ** 0.5
    return torch.nn.init.trunc_normal_(torch.empty(size), 0.0, 1.0, -bound, bound, generator=_seeded(seed))


class Drawn(Family):
    """A direction that torch's CPU generator draws; the last draw is kept, since tensors ask for their parts one by one."""

    exact = False
    fast_combine = False
    whole = True

    def __init__(self, pool: Pool, layout: Layout) -> None:
        super().__init__(pool, layout)
        self._seeds = candidate_seeds(pool)
        self._origins = np.array([entry.origin for entry in layout.entries])
        self._last: tuple[tuple[int, int], dict[int, F32]] = ((-1, -1), {})

    @abstractmethod
    def unit(self, index: int) -> int:
        """The number of the draw that tensor `index` is a part of."""

    @abstractmethod
    def draw(self, seed: int, unit: int) -> dict[int, F32]:
        """float32 [numel] for every tensor of the unit, by index."""

    def add(self, out: F32, base: F32, p0: int, k: int, c: float) -> None:
        np.add(base, np.float32(c) * self._part(p0, len(out), k), out=out)

    def combine(self, out: F32, base: F32, p0: int, coefficients: F32) -> None:
        total = np.zeros_like(out)
        for k in np.flatnonzero(coefficients).tolist():
            total += coefficients[k] * self._part(p0, len(out), k)
        np.add(base, total, out=out)

    def project(self, sums: F64, delta: F32, p0: int, wanted: npt.NDArray[np.bool_] | None) -> None:
        for k in range(self.pool.size) if wanted is None else np.flatnonzero(wanted).tolist():
            sums[k] += np.sum(delta.astype(np.float64) * self._part(p0, len(delta), k))

    def _part(self, p0: int, length: int, k: int) -> F32:
        """float32 [length]: z_k from position p0 on, which must lie in one tensor of the layout."""
        index = int(np.searchsorted(self._origins, p0, side="right")) - 1
        entry = self.layout.entries[index]
        start = p0 - entry.origin
        if start + length > entry.numel:
            raise DirectionsError(
                f"Family '{self.name}' has no values at positions {p0} to {p0 + length - 1}: a run must lie in one tensor.",
                p0=p0,
            )
        return self._values(k, index)[start : start + length]

    def _values(self, k: int, index: int) -> F32:
        """z_k of one tensor. Pieces of a large tensor ask from several threads: each finds the draw whole, or draws it."""
        wanted = (k, self.unit(index))
        key, tensors = self._last
        if key != wanted:
            tensors = self.draw(self._seeds[k], wanted[1])
            self._last = (wanted, tensors)
        return tensors[index]


class TorchStream(Drawn):
    """z_k as FedKSeed's official code draws it: one draw of the whole model."""

    name = "torch"

    def unit(self, index: int) -> int:
        return 0

    def draw(self, seed: int, unit: int) -> dict[int, F32]:
        generator = _seeded(seed)
        drawn = (
            torch.normal(0.0, 1.0, size=entry.shape, dtype=torch.float32, generator=generator) for entry in self.layout.entries
        )
        return {index: z.reshape(-1).numpy() for index, z in enumerate(drawn)}


class TorchTruncated(Drawn):
    """z_k = sqrt(3 d) v_k in a block of d parameters, v_k Ferret's official basis vector: one draw a block.

    v is nearly uniform on [-1/sqrt(d), 1/sqrt(d)], with variance 1/(3 d) less 2/15 of that over d, so E[z z^T] = I but for
    a factor 1 - 2/(15 d). The exact variance is not divided out: so Ferret's official scale d/K_l on v is 1/(3 K_l) on z.
    """

    name = "torch-truncated"

    def __init__(self, pool: Pool, layout: Layout) -> None:
        super().__init__(pool, layout)
        self._members: dict[int, list[int]] = {}
        for index, entry in enumerate(layout.entries):
            self._members.setdefault(entry.block, []).append(index)

    def unit(self, index: int) -> int:
        return self.layout.entries[index].block

    def draw(self, seed: int, unit: int) -> dict[int, F32]:
        size = self.layout.block_sizes[unit]
        z: F32 = truncated_normal(seed, size).mul_(math.sqrt(3.0 * size)).numpy()
        ends = np.cumsum([self.layout.entries[index].numel for index in self._members[unit]])
        return dict(zip(self._members[unit], np.split(z, ends[:-1]), strict=True))


def _seeded(seed: int) -> torch.Generator:
    """A generator of its own, at `seed` as torch.manual_seed puts the global one; seeding it is a hundred times faster."""
    return torch.Generator().manual_seed(seed & MASK32)
