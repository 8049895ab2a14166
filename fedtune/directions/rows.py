"""The kernels of the CPU for families whose directions depend on the shapes of the tensors: matrices come in whole rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fedtune.directions.backends import Move
from fedtune.directions.base import F32, F64, Bools
from fedtune.directions.host import HostBackend, Run, as_array, is_direct
from fedtune.directions.threads import PIECE, ordered_map
from fedtune.layout import ALIGN

ROW_PIECE = 64 * ALIGN  # elements of a piece of whole rows: 16 MB, so that making factors costs little beside products


class RowsBackend(HostBackend):
    """A family that is `shaped`: pieces of matrices are whole rows, in order; the threads of sums are those of the products."""

    def add(self, out: Tensor, base: Tensor, p0: int, k: int, c: float) -> None:
        if out.dim() < 2:
            super().add(out, base, p0, k, c)
        else:
            _apply_rows(partial(self._add, k, c), base.detach(), out.detach(), p0, PIECE)

    def move_and_add(self, weight: Tensor, out: Tensor, p0: int, move: Move, add: Move) -> None:
        self.add(weight, weight, p0, *move)
        self.add(out, weight, p0, *add)

    def combine(self, out: Tensor, base: Tensor, p0: int, coefficients: F32) -> None:
        if out.dim() < 2:
            super().combine(out, base, p0, coefficients)
        else:
            _apply_rows(partial(self._combine, coefficients), base.detach(), out.detach(), p0, ROW_PIECE)

    def project(self, sums: F64, delta: Tensor, p0: int, wanted: Bools | None) -> None:
        if delta.dim() < 2:
            super().project(sums, delta, p0, wanted)
            return
        for offset, (rows,) in whole_rows(delta.detach()):
            host = rows.to(device="cpu", dtype=torch.float32).contiguous()
            self.family.project(sums, as_array(host.view(-1)), p0 + offset, wanted)


def _apply_rows(run: Run, base: Tensor, out: Tensor, p0: int, piece: int) -> None:
    """`run` over a tensor; pieces of at most PIECE elements are additions, which threads share."""
    each = ordered_map if piece <= PIECE and base.is_cpu and out.is_cpu else map
    for _ in each(partial(_apply_piece, run, p0), list(whole_rows(base, out, piece=piece))):
        pass


def _apply_piece(run: Run, p0: int, piece: tuple[int, tuple[Tensor, ...]]) -> None:
    offset, (source, target) = piece
    if is_direct(source) and is_direct(target):
        run(as_array(target.view(-1)), as_array(source.view(-1)), p0 + offset)
        return
    scratch = torch.empty(source.shape).copy_(source)
    values = as_array(scratch.view(-1))
    run(values, values, p0 + offset)
    target.copy_(scratch)


def whole_rows(*tensors: Tensor, piece: int = ROW_PIECE) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """(offset, 2-D views) that cover tensors of one shape, of two or more dimensions, by whole rows of their matrices.

    `piece`: elements of a view at most, where a row has fewer.
    """
    height, *rest = tensors[0].shape
    size = math.prod(rest)
    step = max(1, piece // max(1, size)) if len(rest) == 1 else 1
    for a in range(0, height, step):
        if len(rest) == 1:
            yield a * size, tuple(t[a : a + step] for t in tensors)
        else:
            for offset, views in whole_rows(*(t[a] for t in tensors), piece=piece):
                yield a * size + offset, views
