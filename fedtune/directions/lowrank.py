"""Family lowrank: the direction of a matrix is a product of two thin normal factors, that of a vector plain normals.

For a matrix [out, in] and rank r (at most that of the matrix)

    z_k = sum_j a_j b_j^T / sqrt(r),    a_j in R^out, b_j in R^in, j < r, all entries independent N(0, 1)

so E[z z^T] = I. A tensor of more dimensions is a stack of matrices, its last two. Sources: EGGROLL (arXiv 2511.16652),
LOZO (arXiv 2410.07698).

`add` makes its float32 numbers by the same operations everywhere. `combine` and `project` are matrix products over the
pool, in chunks that the shape fixes, by torch's BLAS: replicas of one machine, library and thread count agree, others may
differ in the last bits, as sums in another order do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedtune.directions.base import F32, F64, Family, Pool
from fedtune.directions.counters import GAUSSIAN, LEFT, RIGHT, pool_key
from fedtune.directions.cpu import gaussian
from fedtune.directions.cpu.factors import add_outer, fill
from fedtune.errors import DirectionsError
from fedtune.layout import Entry, Layout

I64 = npt.NDArray[np.int64]
CHUNK_ROWS = 256  # rows of a factor matrix that are in memory at a time


@dataclass(frozen=True)
class Rows:
    """A run of whole rows of one matrix.

    Attributes:
        start, stop: where they are in the run that the engine gave.
        origin: position of the matrix; first: the number of the first row in it.
        height: of the matrix; rank: of its directions.
    """

    start: int
    stop: int
    origin: int
    first: int
    height: int
    width: int
    rank: int


class Lowrank(Family):
    """Cost of `combine` and `project`: 2 K r floating-point operations per parameter, in matrix products."""

    name = "lowrank"
    exact = False
    fast_combine = False
    shaped = True

    def __init__(self, pool: Pool, layout: Layout) -> None:
        super().__init__(pool, layout)
        self._key = np.array(pool_key(pool), dtype=np.int64)
        self._origins = np.array([entry.origin for entry in layout.entries])

    def add(self, out: F32, base: F32, p0: int, k: int, c: float) -> None:
        entry = self._entry(p0)
        if len(entry.shape) < 2:
            gaussian.add(out, base, p0, k, c, self._key)
            return
        seeds, ones = np.array([k]), np.ones(1, np.float32)
        for rows in self._rows(entry, p0, len(out)):
            shape = (-1, rows.width)
            left, right = self._left(rows, seeds, ones), self._right(rows, seeds)
            here, source = out[rows.start : rows.stop].reshape(shape), base[rows.start : rows.stop].reshape(shape)
            add_outer(here, source, left, right, c)

    def combine(self, out: F32, base: F32, p0: int, coefficients: F32) -> None:
        entry = self._entry(p0)
        if len(entry.shape) < 2:
            gaussian.combine(out, base, p0, coefficients, self._key)
            return
        seeds = np.flatnonzero(coefficients)
        for rows in self._rows(entry, p0, len(out)):
            sums = torch.zeros((rows.stop - rows.start) // rows.width, rows.width)
            for chunk in _chunks(seeds, rows.rank):
                left, right = self._left(rows, chunk, coefficients[chunk]), self._right(rows, chunk)
                sums.addmm_(torch.from_numpy(left).T, torch.from_numpy(right))
            part = slice(rows.start, rows.stop)
            np.add(base[part], sums.numpy().reshape(-1), out=out[part])

    def project(self, sums: F64, delta: F32, p0: int, wanted: npt.NDArray[np.bool_] | None) -> None:
        """See the base class; a sum depends on which seeds are wanted in its last bits, as matrix products do."""
        entry = self._entry(p0)
        seeds = np.arange(self.pool.size) if wanted is None else np.flatnonzero(wanted)
        if len(entry.shape) < 2:
            gaussian.project(sums, delta, p0, seeds, self._key)
            return
        for rows in self._rows(entry, p0, len(delta)):
            matrix = torch.from_numpy(delta[rows.start : rows.stop].reshape(-1, rows.width))
            for chunk in _chunks(seeds, rows.rank):
                left = self._left(rows, chunk, np.ones(len(chunk), np.float32))
                products = torch.from_numpy(self._right(rows, chunk)) @ matrix.T  # [chunk * r, rows]
                dots = np.einsum("ij,ij->i", left, products.numpy(), dtype=np.float64)
                sums[chunk] += dots.reshape(len(chunk), rows.rank).sum(axis=1)

    # ------------------------------------------------------------------ factors

    def factors(self, index: int, ks: Sequence[int], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of seeds `ks` for tensor `index` of the layout, a matrix [out, in] whose directions have rank r.

        z_k = sum_j left[q, j][:, None] * right[q, j][None, :] with k = ks[q]: added up in float32, j ascending, these are
        the bits that `add` uses.

        Returns:
            left float32 [len(ks), r, out], the a_j, and right float32 [len(ks), r, in], the b_j / sqrt(r), on `device`.

        Raises:
            DirectionsError: the tensor is not a matrix, or a seed is not one of the pool.
        """
        entry, seeds = self._shaped_entry(index, 2), self._numbers(ks)
        (height, width), rank = entry.shape, min(self.pool.rank, *entry.shape)
        rows = Rows(0, entry.numel, entry.origin, 0, height, width, rank)
        left, right = self._left(rows, seeds, np.ones(len(seeds), np.float32)), self._right(rows, seeds)
        return (
            torch.from_numpy(left).view(len(seeds), rank, height).to(device),
            torch.from_numpy(right).view(len(seeds), rank, width).to(device),
        )

    def vector(self, index: int, ks: Sequence[int], device: torch.device | str) -> torch.Tensor:
        """float32 [len(ks), n] on `device`: the directions of seeds `ks` for tensor `index`, a vector of n elements.

        Raises:
            DirectionsError: the tensor is not a vector, or a seed is not one of the pool.
        """
        entry, seeds = self._shaped_entry(index, 1), self._numbers(ks)
        rows = np.empty((len(seeds), entry.numel), np.float32)
        fill(rows, entry.origin, entry.numel, seeds, np.ones(len(seeds), np.float32), GAUSSIAN, self._key)
        return torch.from_numpy(rows).to(device)

    def _shaped_entry(self, index: int, dimensions: int) -> Entry:
        entry = self.layout.entries[index]
        if len(entry.shape) != dimensions:
            raise DirectionsError(
                f"'{entry.name}' has shape {list(entry.shape)}: factors are those of a tensor of 2 dimensions, "
                "and a vector has 1.",
                name=entry.name,
            )
        return entry

    def _numbers(self, ks: Sequence[int]) -> I64:
        """int64: the seeds, checked."""
        for k in ks:
            if not 0 <= k < self.pool.size:
                raise DirectionsError(f"There is no seed number {k}: the pool has {self.pool.size} seeds, counted from 0.", k=k)
        return np.array(ks, dtype=np.int64)

    def _left(self, rows: Rows, seeds: I64, scales: F32) -> F32:
        """float32 [len(seeds) * r, rows]: the parts of the a_j that belong to the rows, times the scale of the seed."""
        count = (rows.stop - rows.start) // rows.width
        factors = np.empty((len(seeds) * rows.rank, count), np.float32)
        fill(factors, rows.origin + rows.first, rows.height, seeds, scales, LEFT, self._key)
        return factors

    def _right(self, rows: Rows, seeds: I64) -> F32:
        """float32 [len(seeds) * r, in]: the b_j / sqrt(r)."""
        factors = np.empty((len(seeds) * rows.rank, rows.width), np.float32)
        scales = np.full(len(seeds), 1.0 / math.sqrt(rows.rank), np.float32)
        fill(factors, rows.origin, rows.width, seeds, scales, RIGHT, self._key)
        return factors

    # ------------------------------------------------------------------ where a run is

    def _entry(self, p0: int) -> Entry:
        return self.layout.entries[int(np.searchsorted(self._origins, p0, side="right")) - 1]

    def _rows(self, entry: Entry, p0: int, length: int) -> Iterator[Rows]:
        """The run as rows of the matrices that it goes through."""
        height, width = entry.shape[-2:]
        rank, size = min(self.pool.rank, height, width), height * width
        done = 0
        while done < length:
            matrix, inside = divmod(p0 - entry.origin + done, size)
            count = min(size - inside, length - done)
            yield Rows(done, done + count, entry.origin + matrix * size, inside // width, height, width, rank)
            done += count


def _chunks(seeds: I64, rank: int) -> list[I64]:
    step = max(1, CHUNK_ROWS // rank)
    return [seeds[a : a + step] for a in range(0, len(seeds), step)]
