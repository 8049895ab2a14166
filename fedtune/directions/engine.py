"""Directions over the tensors of a model: checks them, and hands each to the kernels of its device (`choice.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedtune.directions.backends import Backend, Move
from fedtune.directions.base import F32, F64, Bools, Family, Pool, make_family
from fedtune.directions.choice import choose_kernels, make_backend
from fedtune.directions.host import as_array, is_direct
from fedtune.directions.threads import PIECE, each_tensor
from fedtune.errors import DirectionsError
from fedtune.layout import Entry, Layout
from fedtune.pieces import all_finite

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Directions:
    """The directions z_k of `pool` over the tensors of `layout`.

    All arithmetic is float32 whatever the dtype of the weights, and sums of projections are float64. Tensors must have
    the shapes of the layout and be float32, bfloat16 or float16; any device, any strides.

    Args:
        layout: of the tensors.
        pool: whose directions.
        kernels: those to use for every tensor, by name (see `choice.py`); None chooses by the tensors' device.

    Raises (every method):
        DirectionsError: an unknown family, a seed number outside the pool, a tensor or array of another shape or
            dtype, a tensor that is not dense or has no values.
    """

    def __init__(self, layout: Layout, pool: Pool, kernels: str | None = None) -> None:
        self.layout, self.pool = layout, pool
        self.family = make_family(pool, layout)
        self._host = make_backend("host", self.family)
        self._only = None if kernels is None else make_backend(kernels, self.family)
        self._backends: dict[torch.device, Backend] = {}
        self._views: dict[tuple[int, bool], tuple[int, int, F32, F32]] = {}

    def perturb(self, index: int, weight: Tensor, out: Tensor, k: int, c: float) -> None:
        """out = round(float32(weight) + c * z_k) for tensor `index` of the layout; `weight` is only read."""
        if not 0 <= k < self.pool.size:
            raise self._no_such_seed(k)
        entry = self.layout.entries[index]
        if entry.numel <= PIECE and self._only is None and is_direct(weight) and is_direct(out):
            source, target = self._arrays(index, weight, out)
            self.family.add(target, source, entry.origin, k, c)
            return
        _check(entry, weight, out)
        self._backend(weight, out).add(out, weight, entry.origin, k, c)

    def perturb_part(self, index: int, offset: int, weight: Tensor, out: Tensor, k: int, c: float) -> None:
        """As `perturb`, for a part of tensor `index` along its first dimension that begins at element `offset`."""
        if not 0 <= k < self.pool.size:
            raise self._no_such_seed(k)
        self._backend(weight, out).add(out, weight, self.layout.entries[index].origin + offset, k, c)

    def move_and_perturb(self, index: int, weight: Tensor, move: Move, out: Tensor, perturbation: Move) -> None:
        """weight = round(weight + c1 z_k1), then out = round(weight + c2 z_k2), in one pass over the memory of both.

        `move` is (k1, c1), `perturbation` (k2, c2). The values are those of two calls of `perturb`.
        """
        entry = self.layout.entries[index]
        if entry.numel <= PIECE or self.family.whole:
            self.perturb(index, weight, weight, *move)
            self.perturb(index, weight, out, *perturbation)
            return
        for k, _ in (move, perturbation):
            if not 0 <= k < self.pool.size:
                raise self._no_such_seed(k)
        _check(entry, weight, out)
        self._backend(weight, out).move_and_add(weight, out, entry.origin, move, perturbation)

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
        self._check_coefficients(coefficients)
        self._check_all(base)
        self._check_all(out)
        if self.family.whole:
            self._combine_seed_by_seed(base, out, coefficients)
            return
        combination = Combination([(self, coefficients)])
        combination.over(out, lambda index: combination.write(index, base[index], out[index]))

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
            block = self.layout.entries[index].block
            self.accumulate(sums[block], index, delta, None if wanted is None else wanted[block])
        return sums

    def accumulate(self, sums: F64, index: int, delta: Tensor, wanted: Bools | None) -> None:
        """sums [K] += <z_k, delta> for tensor `index`, for every k that is `wanted` (bool [K]; None: all)."""
        entry = self.layout.entries[index]
        _check(entry, delta)
        self._backend(delta).project(sums, delta, entry.origin, wanted)

    def over(self, tensors: Sequence[Tensor], work: Callable[[int], object]) -> None:
        """work(number) for every one of the tensors, each on its own: on the CPU small ones side by side in threads."""
        _over([self.family], tensors, work)

    # ------------------------------------------------------------------ one tensor

    def _backend(self, *tensors: Tensor) -> Backend:
        """The kernels for tensors that are used together; host memory is where tensors of two devices meet."""
        if self._only is not None:
            return self._only
        device = tensors[0].device
        if any(tensor.device != device for tensor in tensors[1:]):
            return self._host
        if device not in self._backends:
            self._backends[device] = make_backend(choose_kernels(device, self.family.name)[0], self.family)
        return self._backends[device]

    def _arrays(self, index: int, base: Tensor, out: Tensor) -> tuple[F32, F32]:
        """Flat numpy views of a small float32 pair. The last ones are kept: every forward pass asks for every tensor."""
        views = self._views.get((index, base is out))
        if views is None or views[0] != base.data_ptr() or views[1] != out.data_ptr():
            _check(self.layout.entries[index], base, out)
            source, target = as_array(base.detach().view(-1)), as_array(out.detach().view(-1))
            views = self._views[index, base is out] = (base.data_ptr(), out.data_ptr(), source, target)
        return views[2], views[3]

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
                    self.accumulate(sums[entry.block], index, delta, only)

    # ------------------------------------------------------------------ checks

    def _no_such_seed(self, k: int) -> DirectionsError:
        return DirectionsError(f"There is no seed number {k}: the pool has {self.pool.size} seeds, counted from 0.", k=k)

    def _check_coefficients(self, coefficients: F32) -> None:
        shape = (self.layout.blocks, self.pool.size)
        if coefficients.shape != shape or coefficients.dtype != np.float32:
            raise DirectionsError(
                f"Coefficients must be float32 [blocks, K] = {list(shape)}, "
                f"not {coefficients.dtype} {list(coefficients.shape)}."
            )
        if not all(map(all_finite, coefficients)):
            raise DirectionsError("Coefficients must be finite: a NaN or infinity would spread over the whole model.")

    def _check_all(self, tensors: Sequence[Tensor]) -> None:
        """Before anything is written, so that a refused call changes nothing."""
        if len(tensors) != len(self.layout.entries):
            raise DirectionsError(
                f"The layout has {len(self.layout.entries)} tensors but {len(tensors)} were given: "
                "pass all trainable tensors in layout order."
            )
        for entry, tensor in zip(self.layout.entries, tensors, strict=True):
            _check(entry, tensor)


class Combination:
    """Coefficients of several pools over one layout, to be added tensor by tensor.

    `steps` are pairs (directions, float32 [L, K]) in order; none of the families may be `whole`.
    """

    def __init__(self, steps: Sequence[tuple[Directions, F32]]) -> None:
        for directions, coefficients in steps:
            directions._check_coefficients(coefficients)
        self._steps = [(directions, np.ascontiguousarray(coefficients)) for directions, coefficients in steps]

    def over(self, out: Sequence[Tensor], work: Callable[[int], object]) -> None:
        """work(index), which writes out[index], for every tensor, as `Directions.over`."""
        _over([directions.family for directions, _ in self._steps], out, work)

    def write(self, index: int, base: Tensor, out: Tensor) -> None:
        """out = round(float32(base) + sum_k C1[block, k] z1_k + ...) for tensor `index`; base may be out.

        The sum of each pool comes first; the sums are added in order, in float32, and rounded to the dtype of `out` once
        (16-bit tensors of several pools take a float32 tensor in between). A base on another device is copied to that of out.
        """
        if not self._steps:
            out.copy_(base)
            return
        _check(self._steps[0][0].layout.entries[index], base, out)
        source = base.detach().to(out.device)
        between = out if out.dtype == torch.float32 else None
        for number, (directions, rows) in enumerate(self._steps, 1):
            last = number == len(self._steps)
            if between is None and not last:
                between = torch.empty(out.shape, device=out.device)
            target = out if last or between is None else between
            entry = directions.layout.entries[index]
            directions._backend(source, target).combine(target, source, entry.origin, rows[entry.block])
            source = target


def _over(families: Sequence[Family], tensors: Sequence[Tensor], work: Callable[[int], object]) -> None:
    own_threads = any(family.shaped for family in families)  # of their matrix products
    if all(tensor.is_cpu for tensor in tensors) and not own_threads:
        each_tensor(work, [tensor.numel() for tensor in tensors])
        return
    for number in range(len(tensors)):
        work(number)


def _check(entry: Entry, *tensors: Tensor) -> None:
    """Refuse tensors that no kernels can work on as those of `entry`."""
    for tensor in tensors:
        if tuple(tensor.shape) != entry.shape:
            raise DirectionsError(
                f"'{entry.name}' has shape {list(entry.shape)} in the layout, but a tensor of {list(tensor.shape)} was given.",
                name=entry.name,
            )
        if tensor.layout is not torch.strided:
            raise DirectionsError(
                f"'{entry.name}' has the layout {tensor.layout}: directions work on dense tensors (torch.strided); "
                "call to_dense() first.",
                name=entry.name,
            )
        if tensor.dtype not in DTYPES:
            raise DirectionsError(
                f"'{entry.name}' is {tensor.dtype}: directions work on float32, bfloat16 and float16 tensors.", name=entry.name
            )
        if tensor.is_meta:
            raise DirectionsError(
                f"'{entry.name}' is on the device meta, where tensors have no values: "
                "directions work on cpu, cuda, mps and xpu; load the weights there.",
                name=entry.name,
            )
