"""Directions over the tensors of a model: cuts tensors of any dtype, device and memory layout into runs for a family.

float32 CPU tensors are worked on in place. All others (16-bit weights, strided views, other devices) go through a small
float32 scratch, chunk by chunk, and are rounded to their own type once. Pieces and chunks start at multiples of the
largest tile and depend on the tensor's size alone, so threads, dtype and device change no value. For a family that is
`shaped`, pieces of matrices are whole rows, one after another: its threads are those of the matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtune.directions.base import F32, F64, Pool, make_family
from fedtune.directions.threads import ordered_map
from fedtune.errors import DirectionsError
from fedtune.layout import ALIGN, Entry, Layout

CHUNK = ALIGN  # elements of the float32 scratch: 256 KB, which fits a core's second-level cache
PIECE = 4 * ALIGN  # elements below which a second thread costs more than it saves
ROW_PIECE = 64 * ALIGN  # elements of a piece of whole rows: 16 MB, so that making factors costs little beside products
MOST_PIECES = 64  # bounds the memory of the partial sums of a projection
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Run = Callable[[F32, F32, int], None]  # (out, base, p0): one contiguous run of a family's add or combine
Bools = npt.NDArray[np.bool_]


class Directions:
    """The directions z_k of `pool` over the tensors of `layout`.

    All arithmetic is float32 whatever the dtype of the weights, and sums of projections are float64. Tensors must have
    the shapes of the layout and be float32, bfloat16 or float16; any device, any strides.

    Raises (every method):
        DirectionsError: an unknown family, a seed number outside the pool, a tensor or array of another shape or dtype.
    """

    def __init__(self, layout: Layout, pool: Pool) -> None:
        self.layout, self.pool = layout, pool
        self.family = make_family(pool, layout)
        self._views: dict[tuple[int, bool], tuple[int, int, F32, F32]] = {}

    def perturb(self, index: int, weight: Tensor, out: Tensor, k: int, c: float) -> None:
        """out = round(float32(weight) + c * z_k) for tensor `index` of the layout; `weight` is only read."""
        if not 0 <= k < self.pool.size:
            raise self._no_such_seed(k)
        entry = self.layout.entries[index]
        if entry.numel <= PIECE and _direct(weight) and _direct(out):
            source, target = self._arrays(index, weight, out)
            self.family.add(target, source, entry.origin, k, c)
        else:
            self._apply(index, weight, out, partial(self._add, k, c))

    def add(self, weights: Sequence[Tensor], k: int, c: float) -> None:
        """weights += c * z_k in place, each tensor rounded to its own dtype once."""
        if not 0 <= k < self.pool.size:
            raise self._no_such_seed(k)
        self._check_all(weights)
        for index, weight in enumerate(weights):
            self.perturb(index, weight, weight, k, c)

    def combine(self, base: Sequence[Tensor], out: Sequence[Tensor], coefficients: F32) -> None:
        """out = round(float32(base) + sum_k C[block, k] z_k), the sum first; base may be out.

        `coefficients` is float32 [L, K], finite.
        """
        shape = (self.layout.blocks, self.pool.size)
        if coefficients.shape != shape or coefficients.dtype != np.float32:
            raise DirectionsError(
                f"Coefficients must be float32 [blocks, K] = {list(shape)}, "
                f"not {coefficients.dtype} {list(coefficients.shape)}."
            )
        if not np.isfinite(coefficients).all():
            raise DirectionsError("Coefficients must be finite: a NaN or infinity would spread over the whole model.")
        self._check_all(base)
        self._check_all(out)
        if self.family.whole:
            self._combine_seed_by_seed(base, out, coefficients)
            return
        rows = np.ascontiguousarray(coefficients)
        for index, entry in enumerate(self.layout.entries):
            self._apply(index, base[index], out[index], partial(self._combine, rows[entry.block]))

    def project(self, deltas: Iterable[tuple[int, Tensor]], wanted: Bools | None = None) -> F64:
        """float64 [L, K]: sum over the tensors of block l of <z_k, delta>, zero where not `wanted` (bool [L, K]; None: all).

        `deltas` yields (tensor index, delta) in layout order and is consumed one at a time. A delta that is not finite
        gives coordinates that are not finite.
        """
        shape = (self.layout.blocks, self.pool.size)
        if wanted is not None and wanted.shape != shape:
            raise DirectionsError(f"`wanted` must be bool [blocks, K] = {list(shape)}, not {list(wanted.shape)}.")
        sums = np.zeros(shape)
        if self.family.whole:
            self._project_seed_by_seed(sums, list(deltas), wanted)
            return sums
        for index, delta in deltas:
            entry = self.layout.entries[index]
            self._accumulate(sums[entry.block], entry, delta, None if wanted is None else wanted[entry.block])
        return sums

    # ------------------------------------------------------------------ one tensor

    def _add(self, k: int, c: float, out: F32, base: F32, p0: int) -> None:
        self.family.add(out, base, p0, k, c)

    def _combine(self, coefficients: F32, out: F32, base: F32, p0: int) -> None:
        self.family.combine(out, base, p0, coefficients)

    def _arrays(self, index: int, base: Tensor, out: Tensor) -> tuple[F32, F32]:
        """Flat numpy views of a small float32 pair. The last ones are kept: every forward pass asks for every tensor."""
        views = self._views.get((index, base is out))
        if views is None or views[0] != base.data_ptr() or views[1] != out.data_ptr():
            _check(self.layout.entries[index], base, out)
            source, target = _array(base.detach().view(-1)), _array(out.detach().view(-1))
            views = self._views[index, base is out] = (base.data_ptr(), out.data_ptr(), source, target)
        return views[2], views[3]

    def _apply(self, index: int, base: Tensor, out: Tensor, run: Run) -> None:
        """`run` over one tensor; in threads where it is large and on the CPU."""
        entry = self.layout.entries[index]
        _check(entry, base, out)
        if self.family.shaped and len(entry.shape) > 1:
            _apply_rows(run, entry, base.detach(), out.detach())
            return
        for offset, (source, target) in _rows(base.detach(), out.detach()):
            pieces = [(source[a:b], target[a:b], entry.origin + offset + a) for a, b in _cut(len(source))]
            each = ordered_map if source.is_cpu and target.is_cpu else map
            for _ in each(partial(_apply_piece, run), pieces):
                pass

    def _accumulate(self, sums: F64, entry: Entry, delta: Tensor, wanted: Bools | None) -> None:
        """sums [K] += <z_k, delta>; the partial sums of the pieces are joined in order."""
        _check(entry, delta)
        if self.family.shaped and len(entry.shape) > 1:
            for offset, (rows,) in _whole_rows(delta.detach()):
                host = rows.to(device="cpu", dtype=torch.float32).contiguous()
                self.family.project(sums, _array(host.view(-1)), entry.origin + offset, wanted)
            return
        for offset, (row,) in _rows(delta.detach()):
            pieces = [(row[a:b], entry.origin + offset + a) for a, b in _cut(len(row))]
            each = ordered_map if row.is_cpu else map
            for part in each(partial(self._project_piece, wanted), pieces):
                sums += part

    def _project_piece(self, wanted: Bools | None, piece: tuple[Tensor, int]) -> F64:
        delta, p0 = piece
        sums = np.zeros(self.pool.size)
        if _direct(delta):
            self.family.project(sums, _array(delta), p0, wanted)
            return sums
        for a in range(0, len(delta), CHUNK):
            host = delta[a : a + CHUNK].to(device="cpu", dtype=torch.float32).contiguous()
            self.family.project(sums, _array(host), p0 + a, wanted)
        return sums

    # ------------------------------------------------------------------ families that draw a direction as a whole

    def _combine_seed_by_seed(self, base: Sequence[Tensor], out: Sequence[Tensor], coefficients: F32) -> None:
        entries = self.layout.entries
        sums = [torch.zeros(entry.shape) for entry in entries]
        for k in np.flatnonzero(coefficients.any(axis=0)).tolist():
            for index, entry in enumerate(entries):
                if coefficient := float(coefficients[entry.block, k]):
                    self.perturb(index, sums[index], sums[index], k, coefficient)
        for source, target, total in zip(base, out, sums, strict=True):
            target.detach().copy_(source.detach().to(device="cpu", dtype=torch.float32) + total)

    def _project_seed_by_seed(self, sums: F64, deltas: list[tuple[int, Tensor]], wanted: Bools | None) -> None:
        for k in range(self.pool.size):
            only = np.zeros(self.pool.size, dtype=bool)
            only[k] = True
            for index, delta in deltas:
                entry = self.layout.entries[index]
                if wanted is None or wanted[entry.block, k]:
                    self._accumulate(sums[entry.block], entry, delta, only)

    # ------------------------------------------------------------------ checks

    def _no_such_seed(self, k: int) -> DirectionsError:
        return DirectionsError(f"There is no seed number {k}: the pool has {self.pool.size} seeds, counted from 0.", k=k)

    def _check_all(self, tensors: Sequence[Tensor]) -> None:
        """Before anything is written, so that a refused call changes nothing."""
        if len(tensors) != len(self.layout.entries):
            raise DirectionsError(
                f"The layout has {len(self.layout.entries)} tensors but {len(tensors)} were given: "
                "pass all trainable tensors in layout order."
            )
        for entry, tensor in zip(self.layout.entries, tensors, strict=True):
            _check(entry, tensor)


def _apply_piece(run: Run, piece: tuple[Tensor, Tensor, int]) -> None:
    base, out, p0 = piece
    if _direct(base) and _direct(out):
        run(_array(out), _array(base), p0)
        return
    scratch = torch.empty(min(CHUNK, len(base)))
    for a in range(0, len(base), CHUNK):
        part = scratch[: len(base) - a]
        part.copy_(base[a : a + CHUNK])
        values = _array(part)
        run(values, values, p0 + a)
        out[a : a + CHUNK].copy_(part)


def _apply_rows(run: Run, entry: Entry, base: Tensor, out: Tensor) -> None:
    for offset, (source, target) in _whole_rows(base, out):
        p0 = entry.origin + offset
        if _direct(source) and _direct(target):
            run(_array(target.view(-1)), _array(source.view(-1)), p0)
        else:
            scratch = torch.empty(source.shape).copy_(source)
            values = _array(scratch.view(-1))
            run(values, values, p0)
            target.copy_(scratch)


def _whole_rows(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """(offset, 2-D views) that cover tensors of one shape, of two or more dimensions, by whole rows of their matrices."""
    height, *rest = tensors[0].shape
    size = math.prod(rest)
    step = max(1, ROW_PIECE // max(1, size)) if len(rest) == 1 else 1
    for a in range(0, height, step):
        if len(rest) == 1:
            yield a * size, tuple(t[a : a + step] for t in tensors)
        else:
            for offset, views in _whole_rows(*(t[a] for t in tensors)):
                yield a * size + offset, views


def _rows(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """(offset, 1-D views) that cover tensors of one shape in the order of their elements: one row if all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        yield 0, tuple(t.view(-1) for t in tensors)
    elif tensors[0].dim() == 1:
        yield 0, tensors
    else:
        size = tensors[0][0].numel()
        for i in range(tensors[0].shape[0]):
            for offset, views in _rows(*(t[i] for t in tensors)):
                yield i * size + offset, views


def _cut(length: int) -> list[tuple[int, int]]:
    """The pieces of a row: at least PIECE long, at most MOST_PIECES, starting at multiples of the largest tile."""
    per_piece = -(-length // MOST_PIECES)
    size = max(PIECE, -(-per_piece // ALIGN) * ALIGN)
    return [(a, min(a + size, length)) for a in range(0, length, size)]


def _direct(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()


def _array(tensor: Tensor) -> F32:
    array: F32 = tensor.numpy()
    return array


def _check(entry: Entry, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tuple(tensor.shape) != entry.shape:
            raise DirectionsError(
                f"'{entry.name}' has shape {list(entry.shape)} in the layout, but a tensor of {list(tensor.shape)} was given.",
                name=entry.name,
            )
        if tensor.dtype not in DTYPES:
            raise DirectionsError(
                f"'{entry.name}' is {tensor.dtype}: directions work on float32, bfloat16 and float16 tensors.", name=entry.name
            )
