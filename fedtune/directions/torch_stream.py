"""Family torch: the directions that the official FedKSeed code draws on the CPU, bit by bit. For parity only.

For a literal seed s: torch's CPU generator is seeded with s (of which it uses the low 32 bits), then one
`torch.normal(0, 1)` is drawn per parameter, in order. Source: zhenqincn/FedKSeed, optimizers/mezo_optimizer.py.
The values depend on torch's version, on tensor shapes and on their order, so nothing else uses this family.
"""

from __future__ import annotations

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


class TorchStream(Family):
    """z_k as drawn by torch's CPU generator; the last direction is kept, since tensors ask for their parts one by one."""

    name = "torch"
    exact = False
    fast_combine = False
    whole = True

    def __init__(self, pool: Pool, layout: Layout) -> None:
        super().__init__(pool, layout)
        self._seeds = candidate_seeds(pool)
        self._origins = np.array([entry.origin for entry in layout.entries])
        self._generator = torch.Generator()
        self._drawn: tuple[int, list[F32]] = (-1, [])

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
                f"Family 'torch' has no values at positions {p0} to {p0 + length - 1}: a run must lie in one tensor.", p0=p0
            )
        return self._direction(k)[index][start : start + length]

    def _direction(self, k: int) -> list[F32]:
        if self._drawn[0] != k:
            self._generator.manual_seed(self._seeds[k] & MASK32)
            drawn = [
                torch.normal(0.0, 1.0, size=entry.shape, dtype=torch.float32, generator=self._generator)
                for entry in self.layout.entries
            ]
            self._drawn = (k, [z.reshape(-1).numpy() for z in drawn])
        return self._drawn[1]
