"""The families of directions by name: each a thin shell that hands runs to its compiled kernels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedtune.directions.base import F32, F64, Family, Pool
from fedtune.directions.counters import column_shifts, pool_key, tile_bits
from fedtune.directions.cpu import hadamard
from fedtune.layout import Layout


class Hadamard(Family):
    """z_k[p] = D[p] * H[p mod n, pi_t(k)]: exactly orthogonal in a full tile of n = 4096 (or more, for a larger pool).

    Cost of `combine` and `project`: one fast Walsh-Hadamard transform a tile, independent of K.
    """

    name = "hadamard"
    exact = True
    fast_combine = True

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


FAMILIES: dict[str, type[Family]] = {family.name: family for family in (Hadamard,)}
