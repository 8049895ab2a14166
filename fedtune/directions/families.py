"""The families of directions by name: each a thin shell that hands runs to its compiled kernels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedtune.directions.axes import Axes
from fedtune.directions.base import F32, F64, Family, Pool
from fedtune.directions.counters import column_shifts, pool_key, tile_bits
from fedtune.directions.cpu import gaussian, hadamard, rademacher
from fedtune.directions.lowrank import Lowrank
from fedtune.directions.torch_stream import TorchStream, TorchTruncated
from fedtune.layout import Layout


class Hadamard(Family):
    """z_k[p] = D[p] * H[p mod n, pi_t(k)]: exactly orthogonal in a full tile of n = 4096 (or more, for a larger pool).

    Cost of `combine` and `project`: one fast Walsh-Hadamard transform a tile, independent of K. Two seeds of a pool are
    uncorrelated over pool seeds except at the first position of each tile, where row 0 of H makes all of them D.
    """

    name = "hadamard"
    exact = True
    fast_combine = True
    takes_bits = True

    def __init__(self, pool: Pool, layout: Layout) -> None:
        super().__init__(pool, layout)
        bits = tile_bits(pool.size)
        self._tile = np.array([*pool_key(pool), bits, *column_shifts(bits)], dtype=np.int64)

    def add(self, out: F32, base: F32, p0: int, k: int, c: float) -> None:
        hadamard.add(out, base, p0, k, c, self._tile)

    def combine(self, out: F32, base: F32, p0: int, coefficients: F32) -> None:
        hadamard.combine(out, base, p0, coefficients, self._tile)

    def project(self, sums: F64, delta: F32, p0: int, wanted: npt.NDArray[np.bool_] | None) -> None:
        if wanted is None:
            hadamard.project(sums, delta, p0, self._tile)
        else:
            every = np.zeros_like(sums)
            hadamard.project(every, delta, p0, self._tile)
            sums[wanted] += every[wanted]


class Rademacher(Family):
    """Independent random signs. Cost of `combine` and `project`: proportional to the seeds that count."""

    name = "rademacher"
    exact = True
    fast_combine = False

    def __init__(self, pool: Pool, layout: Layout) -> None:
        super().__init__(pool, layout)
        self._key = np.array(pool_key(pool), dtype=np.int64)

    def add(self, out: F32, base: F32, p0: int, k: int, c: float) -> None:
        rademacher.add(out, base, p0, k, c, self._key)

    def combine(self, out: F32, base: F32, p0: int, coefficients: F32) -> None:
        rademacher.combine(out, base, p0, coefficients, self._key)

    def project(self, sums: F64, delta: F32, p0: int, wanted: npt.NDArray[np.bool_] | None) -> None:
        rademacher.project(sums, delta, p0, _numbers(self.pool, wanted), self._key)


class Gaussian(Family):
    """Independent N(0, 1), the papers' distribution. Cost of `combine` and `project`: proportional to the seeds that count."""

    name = "gaussian"
    exact = False
    fast_combine = False

    def __init__(self, pool: Pool, layout: Layout) -> None:
        super().__init__(pool, layout)
        self._key = np.array(pool_key(pool), dtype=np.int64)

    def add(self, out: F32, base: F32, p0: int, k: int, c: float) -> None:
        gaussian.add(out, base, p0, k, c, self._key)

    def combine(self, out: F32, base: F32, p0: int, coefficients: F32) -> None:
        gaussian.combine(out, base, p0, coefficients, self._key)

    def project(self, sums: F64, delta: F32, p0: int, wanted: npt.NDArray[np.bool_] | None) -> None:
        gaussian.project(sums, delta, p0, _numbers(self.pool, wanted), self._key)


def _numbers(pool: Pool, wanted: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
    """int64: the numbers of the wanted seeds."""
    return np.arange(pool.size) if wanted is None else np.flatnonzero(wanted)


FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (Hadamard, Rademacher, Gaussian, Lowrank, TorchStream, TorchTruncated, Axes)
}
