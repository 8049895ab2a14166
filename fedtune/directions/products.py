"""Family lowrank where its tensors live: factors made on the device, and matrix products of them over the pool."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedtune.directions.backends import Backend
from fedtune.directions.base import F32, F64, Bools
from fedtune.directions.factors import Fill
from fedtune.directions.lowrank import Lowrank, Rows, chunks
from fedtune.directions.precision import full_float32
from fedtune.directions.rows import whole_rows
from fedtune.directions.torch_ops.sums import ordered_sum, wide


class ProductsBackend(Backend):
    """Matrices by products of the factors that `fill` makes, piece by piece of whole rows; `vectors` has the rest."""

    def __init__(self, family: Lowrank, vectors: Backend, fill: Fill) -> None:
        self._family, self._vectors, self._fill = family, vectors, fill

    def add(self, out: Tensor, base: Tensor, p0: int, k: int, c: float) -> None:
        if out.dim() < 2:
            self._vectors.add(out, base, p0, k, c)
            return
        seeds, ones = np.array([k]), np.ones(1, np.float32)
        for rows, (source, target) in self._pieces(p0, base, out):
            left = self._fill(self._family.left(rows, seeds, ones), target.device)
            right = self._fill(self._family.right(rows, seeds), target.device)
            z = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
            for a, b in zip(left, right, strict=True):
                z += a[:, None] * b[None, :]
            _write(target, source, z.mul_(float(np.float32(c))))

    def combine(self, out: Tensor, base: Tensor, p0: int, coefficients: F32) -> None:
        if out.dim() < 2:
            self._vectors.combine(out, base, p0, coefficients)
            return
        seeds = np.flatnonzero(coefficients)
        for rows, (source, target) in self._pieces(p0, base, out):
            sums = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
            for chunk in chunks(seeds, rows.rank):
                left = self._fill(self._family.left(rows, chunk, coefficients[chunk]), target.device)
                right = self._fill(self._family.right(rows, chunk), target.device)
                with full_float32():
                    sums.addmm_(left.T, right)
            _write(target, source, sums)

    def project(self, sums: F64, delta: Tensor, p0: int, wanted: Bools | None) -> None:
        if delta.dim() < 2:
            self._vectors.project(sums, delta, p0, wanted)
            return
        seeds = np.arange(len(sums)) if wanted is None else np.flatnonzero(wanted)
        for rows, (piece,) in self._pieces(p0, delta):
            matrix = piece.to(torch.float32)
            for chunk in chunks(seeds, rows.rank):
                left = self._fill(self._family.left(rows, chunk, np.ones(len(chunk), np.float32)), matrix.device)
                right = self._fill(self._family.right(rows, chunk), matrix.device)
                with full_float32():
                    products = right @ matrix.T  # [chunk * r, rows]
                dots = ordered_sum(wide(left) * wide(products))
                sums[chunk] += dots.cpu().numpy().reshape(len(chunk), rows.rank).sum(axis=1)

    def _pieces(self, p0: int, *tensors: Tensor) -> Iterator[tuple[Rows, tuple[Tensor, ...]]]:
        """Where each piece of whole rows of one matrix is, and its views."""
        entry = self._family.entry_at(p0)
        for offset, views in whole_rows(*(tensor.detach() for tensor in tensors)):
            if views[0].numel():
                (rows,) = self._family.rows(entry, p0 + offset, views[0].numel())
                yield rows, views


def _write(target: Tensor, source: Tensor, change: Tensor) -> None:
    """target = round(float32(source) + change)."""
    target.copy_(source.to(device=target.device, dtype=torch.float32) + change)
