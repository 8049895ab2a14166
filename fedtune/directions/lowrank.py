"""Family lowrank: the direction of a matrix is a product of two thin normal factors, that of a vector plain normals.

For a matrix [out, in] and rank r (at most that of the matrix)

    z_k = sum_j a_j b_j^T / sqrt(r),    a_j in R^out, b_j in R^in, j < r, all entries independent N(0, 1)

so E[z z^T] = I. A tensor of more dimensions is a stack of matrices, its last two. Sources: EGGROLL (arXiv 2511.16652),
LOZO (arXiv 2410.07698).

`add` makes its float32 numbers by the same operations everywhere. `combine` and `project` are matrix products over the
pool, in chunks that the shape fixes, by torch's BLAS: replicas of one machine, library and thread count agree, others may
differ in the last bits, as sums in another order do. This file works on host memory; `products.py` is for other devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtune.directions.base import F32, F64, MAX_RANK, Family, Pool
from fedtune.directions.choice import filler
from fedtune.directions.counters import GAUSSIAN, LEFT, RIGHT, pool_key
from fedtune.directions.cpu import gaussian
from fedtune.directions.cpu.factors import add_outer
from fedtune.directions.factors import Factor, fill
from fedtune.directions.precision import full_float32
from fedtune.errors import DirectionsError
from fedtune.layout import Entry, Layout

I64 = npt.NDArray[np.int64]
CPU = torch.device("cpu")
CHUNK_ROWS = MAX_RANK  # rows of a factor matrix that are in memory at a time


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
    thin = True

    def __init__(self, pool: Pool, layout: Layout) -> None:
        super().__init__(pool, layout)
        self._words = pool_key(pool)
        self._key = np.array(self._words, dtype=np.int64)
        self._origins = np.array([entry.origin for entry in layout.entries])

    def add(self, out: F32, base: F32, p0: int, k: int, c: float) -> None:
        entry = self.entry_at(p0)
        if len(entry.shape) < 2:
            gaussian.add(out, base, p0, k, c, self._key)
            return
        seeds, ones = np.array([k]), np.ones(1, np.float32)
        for rows in self.rows(entry, p0, len(out)):
            shape = (-1, rows.width)
            left, right = fill(self.left(rows, seeds, ones), CPU).numpy(), fill(self.right(rows, seeds), CPU).numpy()
            here, source = out[rows.start : rows.stop].reshape(shape), base[rows.start : rows.stop].reshape(shape)
            add_outer(here, source, left, right, c)

    def combine(self, out: F32, base: F32, p0: int, coefficients: F32) -> None:
        entry = self.entry_at(p0)
        if len(entry.shape) < 2:
            gaussian.combine(out, base, p0, coefficients, self._key)
            return
        seeds = np.flatnonzero(coefficients)
        for rows in self.rows(entry, p0, len(out)):
            sums = torch.zeros((rows.stop - rows.start) // rows.width, rows.width)
            for chunk in chunks(seeds, rows.rank):
                left, right = fill(self.left(rows, chunk, coefficients[chunk]), CPU), fill(self.right(rows, chunk), CPU)
                with full_float32():
                    sums.addmm_(left.T, right)
            part = slice(rows.start, rows.stop)
            np.add(base[part], sums.numpy().reshape(-1), out=out[part])

    def project(self, sums: F64, delta: F32, p0: int, wanted: npt.NDArray[np.bool_] | None) -> None:
        """See the base class; a sum depends on which seeds are wanted in its last bits, as matrix products do."""
        entry = self.entry_at(p0)
        seeds = np.arange(self.pool.size) if wanted is None else np.flatnonzero(wanted)
        if len(entry.shape) < 2:
            gaussian.project(sums, delta, p0, seeds, self._key)
            return
        for rows in self.rows(entry, p0, len(delta)):
            matrix = torch.from_numpy(delta[rows.start : rows.stop].reshape(-1, rows.width))
            for chunk in chunks(seeds, rows.rank):
                left = fill(self.left(rows, chunk, np.ones(len(chunk), np.float32)), CPU).numpy()
                with full_float32():
                    products = fill(self.right(rows, chunk), CPU) @ matrix.T  # [chunk * r, rows]
                dots = np.einsum("ij,ij->i", left, products.numpy(), dtype=np.float64)
                sums[chunk] += dots.reshape(len(chunk), rows.rank).sum(axis=1)

    # ------------------------------------------------------------------ factors

    def factors(self, index: int, ks: Sequence[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The factors of seeds `ks` for tensor `index` of the layout, a matrix [out, in] whose directions have rank r.

        z_k = sum_j left[q, j][:, None] * right[q, j][None, :] with k = ks[q]: added up in float32, j ascending, these are
        the bits that `add` uses. They are made on `device`, by its kernels.

        Returns:
            left float32 [len(ks), r, out], the a_j, and right float32 [len(ks), r, in], the b_j / sqrt(r), on `device`.

        Raises:
            DirectionsError: the tensor is not a matrix, or a seed is not one of the pool.
        """
        entry, seeds, where = self._of_dimensions(index, 2), self._numbers(ks), torch.device(device)
        make = filler(where)
        (rows,) = self.rows(entry, entry.origin, entry.numel)
        left = make(self.left(rows, seeds, np.ones(len(seeds), np.float32)), where)
        right = make(self.right(rows, seeds), where)
        return left.view(len(seeds), rows.rank, -1), right.view(len(seeds), rows.rank, -1)

    def vector(self, index: int, ks: Sequence[int], device: torch.device | str) -> Tensor:
        """float32 [len(ks), n] on `device`: the directions of seeds `ks` for tensor `index`, a vector of n elements.

        Raises:
            DirectionsError: the tensor is not a vector, or a seed is not one of the pool.
        """
        entry, seeds, where = self._of_dimensions(index, 1), self._numbers(ks), torch.device(device)
        ones = np.ones(len(seeds), np.float32)
        return filler(where)(Factor(GAUSSIAN, entry.origin, entry.numel, 1, entry.numel, seeds, ones, self._words), where)

    def left(self, rows: Rows, seeds: I64, scales: F32) -> Factor:
        """[len(seeds) * r, rows]: the parts of the a_j that belong to the rows, times the scale of the seed."""
        count = (rows.stop - rows.start) // rows.width
        return Factor(LEFT, rows.origin + rows.first, rows.height, rows.rank, count, seeds, scales, self._words)

    def right(self, rows: Rows, seeds: I64) -> Factor:
        """[len(seeds) * r, in]: the b_j / sqrt(r)."""
        scales = np.full(len(seeds), 1.0 / math.sqrt(rows.rank), np.float32)
        return Factor(RIGHT, rows.origin, rows.width, rows.rank, rows.width, seeds, scales, self._words)

    def _of_dimensions(self, index: int, dimensions: int) -> Entry:
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

    # ------------------------------------------------------------------ where a run is

    def entry_at(self, p0: int) -> Entry:
        """The tensor that position p0 belongs to."""
        return self.layout.entries[int(np.searchsorted(self._origins, p0, side="right")) - 1]

    def rows(self, entry: Entry, p0: int, length: int) -> Iterator[Rows]:
        """The run as rows of the matrices that it goes through."""
        height, width = entry.shape[-2:]
        rank, size = min(self.pool.rank, height, width), height * width
        done = 0
        while done < length:
            matrix, inside = divmod(p0 - entry.origin + done, size)
            count = min(size - inside, length - done)
            yield Rows(done, done + count, entry.origin + matrix * size, inside // width, height, width, rank)
            done += count


def chunks(seeds: I64, rank: int) -> list[I64]:
    """The seeds, cut into those whose factors are in memory at a time."""
    step = CHUNK_ROWS // rank
    return [seeds[a : a + step] for a in range(0, len(seeds), step)]
