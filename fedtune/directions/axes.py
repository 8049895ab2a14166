"""Family axes: direction k is the axis of parameter k, so that coefficients are an update of the weights themselves.

    z_k[p] = 1 where position p is parameter k (counted over the tensors in layout order), else 0

It makes the methods that send all weights (FedAvg and its kin) states like any other: w0 plus coefficients over directions.
No two axes share a position, so nothing is summed and nothing has to be exact; and since the axes are not random, E[z z^T] is
not the identity over pools: seeds of a smaller pool would reach its own parameters only. Algorithms choose this family;
settings cannot.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedtune.directions.base import F32, F64, Family, Pool
from fedtune.layout import Layout
from fedtune.pieces import release


class Axes(Family):
    """One addition per parameter, whatever K. A pool smaller than the model leaves the parameters from K on alone."""

    name = "axes"
    exact = True
    fast_combine = True

    def __init__(self, pool: Pool, layout: Layout) -> None:
        super().__init__(pool, layout)
        self._origins = np.array([entry.origin for entry in layout.entries])
        self._firsts = np.cumsum([0, *(entry.numel for entry in layout.entries)])

    def add(self, out: F32, base: F32, p0: int, k: int, c: float) -> None:
        if out is not base:
            out[:] = base
        at = k - self._first(p0)
        if 0 <= at < len(out):
            out[at] += np.float32(c)

    def combine(self, out: F32, base: F32, p0: int, coefficients: F32) -> None:
        first = self._first(p0)
        part = coefficients[first : first + len(out)]
        np.add(base[: len(part)], part, out=out[: len(part)])
        if out is not base:
            out[len(part) :] = base[len(part) :]
        release(coefficients)

    def project(self, sums: F64, delta: F32, p0: int, wanted: npt.NDArray[np.bool_] | None) -> None:
        first = self._first(p0)
        part = slice(first, min(first + len(delta), self.pool.size))
        found = delta[: max(0, part.stop - part.start)]
        sums[part] += found if wanted is None else np.where(wanted[part], found, 0.0)

    def _first(self, p0: int) -> int:
        """The number of the parameter at position p0: its tensor's first one, and how far into the tensor it is."""
        index = int(np.searchsorted(self._origins, p0, side="right")) - 1
        return int(self._firsts[index]) + p0 - int(self._origins[index])
