"""The model of a state, rebuilt from the base: `weights = round(w0 + C.z)`, the same bits wherever it is done.

A replica owns the trainable tensors of one loaded model. `become` brings them to a state; local training may then write
them, and the next `become` starts from the base again, so no error of training or of 16-bit arithmetic is ever kept.

Only the live weights are in memory. The base is at rest (`at_rest`), mapped from the model's own files where it can be,
and read tensor by tensor. Pools that are finished are added in the same pass as long as they are FEW; more of them are
folded once, in float32, into an anchor, which is at rest too. A family that is slow to combine also leaves a copy of the
start at rest, for the next client.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from fedtune.at_rest import AtRest
from fedtune.coefficients import Coefficients, PoolCoefficients
from fedtune.directions import Combination, Directions, Pool
from fedtune.directions.base import F32, F64
from fedtune.errors import MismatchError
from fedtune.layout import Layout, fingerprint, trainable
from fedtune.perturb import Perturbation
from fedtune.scratch import IN_MEMORY

NORM_PIECE = 1 << 16  # elements whose squares are summed at once
FEW = 8
"""Finished pools that are added again at every rebuild: each costs about three copies of the weights (hadamard)."""


class Replica:
    """One resident model that can become any state of a run.

    Args:
        model: freshly loaded; its trainable weights are the base w0.
        layout: of its trainable tensors, with the algorithm's blocks.
        folder: that the model was loaded from, whose files must not change as long as the replica lives; None: the base
            is copied.
        in_memory: bytes up to which what is not in the folder is kept in memory and not in a private file.
        device: where the model computes if its weights stay where they are (`offload`); None: where they are.

    Raises:
        ModelError: (also from `become`) the cache folder has no room, or a file of the model folder was changed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layout: Layout,
        folder: Path | None = None,
        in_memory: int = IN_MEMORY,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.layout = model, layout
        named = trainable(model)
        self.weights = [parameter for _, parameter in named]
        self.fingerprint = fingerprint(model)
        self.perturbation = Perturbation(model, layout, device=device)
        self._in_memory = in_memory
        self._base = AtRest.copy_of(named, folder, in_memory)
        self._anchor: AtRest | None = None
        self._folded: tuple[bytes, ...] = ()
        self._kept: AtRest | None = None
        self._kept_is: tuple[bytes, ...] | None = None
        self._source, self._steps = self._base, tuple[PoolCoefficients, ...]()
        self._again: Combination | None = None
        self._model = Coefficients(())
        self._moving: tuple[AtRest, Directions, F32] | None = None
        self._holds: bytes | None = Coefficients(()).digest(self.fingerprint)
        self._directions: dict[Pool, Directions] = {}

    def directions(self, pool: Pool) -> Directions:
        """The directions of `pool` over this model (kernels prepared once; the newest pools are kept)."""
        if pool not in self._directions:
            while len(self._directions) > FEW:
                self._directions.pop(next(iter(self._directions)))
            self._directions[pool] = Directions(self.layout, pool)
        return self._directions[pool]

    def touch(self) -> None:
        """Say that the live weights are about to be written, so that the next `become` rebuilds them."""
        self._holds = None

    @torch.no_grad()
    def become(self, coefficients: Coefficients, expected: bytes | None = None) -> bytes:
        """Bring the live weights to the model that `coefficients` describe; returns its digest.

        Args:
            coefficients: all pools in order.
            expected: digest that the server announced.

        Raises:
            MismatchError: the digest is another one; the weights are left as they were.
        """
        digest = coefficients.digest(self.fingerprint)
        if expected is not None and digest != expected:
            raise MismatchError(
                "The coefficients do not lead to the model that the server announced: base model or pools differ.",
                expected=expected.hex(),
                got=digest.hex(),
            )
        self._model, self._moving = coefficients, None  # its open pool, still zero, may be another one at the same digest
        if digest == self._holds:
            return digest
        self._base.check()
        self._holds = None
        self.perturbation.live.begin()
        closed = tuple(pool for pool in coefficients.pools[:-1] if not pool.is_zero)  # adding 0 would turn -0 into 0
        newest = coefficients.pools[-1:]
        self._source, self._steps = self._plan(closed, newest)
        self._again = None
        self._add(self._steps, self._source, [weight.data for weight in self.weights])
        if any(not self.directions(pool.pool).family.fast_combine for pool in self._steps):
            self._keep((*closed, *newest))
        self._holds = digest
        return digest

    @torch.no_grad()
    def start(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Tensor `index` as the last `become` wrote it: rebuilt, the same bits. In `out`, or in a tensor of its own."""
        out = torch.empty_like(self.weights[index].data) if out is None else out
        if self._again is None:
            self._again = Combination(self._pairs(self._steps))
        self._again.write(index, self._source.tensors[index], out)
        self._source.release(index)
        return out

    @cached_property
    def scales(self) -> F64:
        """float64 [L]: the root mean square of the base weights of each block."""
        squares = np.zeros(self.layout.blocks)
        for index, entry in enumerate(self.layout.entries):
            parts = torch.split(self._base.tensors[index].reshape(-1), NORM_PIECE)
            squares[entry.block] += math.fsum(float(part.double().square_().sum()) for part in parts)
            self._base.release(index)
        return np.asarray(np.sqrt(squares / np.array(self.layout.block_sizes)))

    @torch.no_grad()
    def move(self, moved: F64, /) -> None:
        """The live weights become those of the last `become` with `moved` (float64 [L, K]) added to its last pool.

        Each time from the base, or from the anchor, with sums in float32 that are rounded once, by the rule of the live
        weights: nothing adds up over many moves, and 16-bit weights are as near as they can be.
        """
        if self._moving is None:
            self._moving = self._from_where()
        source, directions, values = self._moving
        total = (values + moved).astype(np.float32)
        if directions.family.whole:
            directions.combine(source.tensors, [weight.data for weight in self.weights], total)
            return
        combination = Combination([(directions, total)])

        def write(index: int) -> None:
            self.perturbation.live.write(index, partial(combination.write, index, source.tensors[index]))
            source.release(index)

        combination.over(self.weights, write)

    def _from_where(self) -> tuple[AtRest, Directions, F32]:
        """What all but the open pool makes; the open pool's directions and coefficients."""
        *closed, newest = self._model.pools
        changing = tuple(pool for pool in closed if not pool.is_zero)
        return self._fold(changing) if changing else self._base, self.directions(newest.pool), newest.values

    def _plan(
        self, closed: tuple[PoolCoefficients, ...], newest: tuple[PoolCoefficients, ...]
    ) -> tuple[AtRest, tuple[PoolCoefficients, ...]]:
        """What to start from, and the pools to add to it."""
        pending = () if not newest or newest[0].is_zero else newest
        if self._kept is not None and pending and self._kept_is == _identities((*closed, *pending)):
            return self._kept, ()
        slow = any(not self.directions(pool.pool).family.fast_combine for pool in closed)
        if self._folded and _identities(closed)[: len(self._folded)] == self._folded:
            return self._fold(closed), pending  # as an algorithm that moves along the open pool needs it
        if not closed or (len(closed) <= FEW and not slow):
            return self._base, (*closed, *pending)
        return self._fold(closed), pending

    def _fold(self, closed: tuple[PoolCoefficients, ...]) -> AtRest:
        """The anchor: w0 plus all closed pools, in float32 sums, going on from the pools that it already has."""
        wanted = _identities(closed)
        source = self._anchor
        if source is None or not self._folded or wanted[: len(self._folded)] != self._folded:
            source, self._folded = self._base, ()
        new = closed[len(self._folded) :]
        if self._anchor is None:
            self._anchor = AtRest.blank([(entry.shape, torch.float32) for entry in self.layout.entries], self._in_memory)
        if new:
            self._folded = ()  # until it is done, an interrupted fold starts again from the base
            for start in range(0, len(new), FEW):  # at a time, since their coefficients are float32 meanwhile
                self._add(new[start : start + FEW], source, self._anchor.tensors, self._anchor)
                source = self._anchor
        self._folded = wanted
        return self._anchor

    def _keep(self, pools: tuple[PoolCoefficients, ...]) -> None:
        """Keep the live weights, made of these pools, at rest, to start from next time."""
        if self._kept is None:
            self._kept = AtRest.blank([(tuple(weight.shape), weight.dtype) for weight in self.weights], self._in_memory)
        self._kept_is = None
        self._add((), None, self._kept.tensors, self._kept)
        self._kept_is = _identities(pools)
        self._source, self._steps, self._again = self._kept, (), None

    def _add(
        self,
        pools: tuple[PoolCoefficients, ...],
        source: AtRest | None,
        targets: Sequence[torch.Tensor],
        target: AtRest | None = None,
    ) -> None:
        """targets = source (None: the live weights) plus the pools, in order, rounded to the dtype of the target once."""
        origin = [weight.data for weight in self.weights] if source is None else source.tensors
        if any(self.directions(pool.pool).family.whole for pool in pools):
            for pool in pools:  # targets of more than one are float32, the anchor
                self.directions(pool.pool).combine(origin, targets, pool.values)
                origin = list(targets)
            return
        combination = Combination(self._pairs(pools))

        def write(index: int) -> None:
            combination.write(index, origin[index], targets[index])
            for stored in (source, target):
                if stored is not None:
                    stored.release(index)

        combination.over(targets, write)

    def _pairs(self, pools: Sequence[PoolCoefficients]) -> list[tuple[Directions, F32]]:
        return [(self.directions(pool.pool), pool.values) for pool in pools]


def _identities(pools: Sequence[PoolCoefficients]) -> tuple[bytes, ...]:
    return tuple(pool.identity for pool in pools)
