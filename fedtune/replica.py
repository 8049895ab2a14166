"""The model of a state, rebuilt from the base: `weights = round(w0 + C.z)`, the same bits wherever it is done.

A replica owns the trainable tensors of one loaded model. `become` brings them to a state; local training may then write
them, and the next `become` starts from the base again, so no error of training or of 16-bit arithmetic is ever kept.
Pools that are finished are folded, one after another, into an anchor; the open pool is added on top.
"""

from __future__ import annotations

import torch

from fedtune.coefficients import Coefficients, PoolCoefficients
from fedtune.directions import Directions, Pool
from fedtune.errors import MismatchError
from fedtune.layout import Layout, fingerprint, trainable
from fedtune.perturb import Perturbation


class Replica:
    """One resident model that can become any state of a run.

    Args:
        model: freshly loaded; its trainable weights are the base w0 (kept as one copy beside the live weights).
        layout: of its trainable tensors, with the algorithm's blocks.
    """

    def __init__(self, model: torch.nn.Module, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.weights = [parameter for _, parameter in trainable(model)]
        self.fingerprint = fingerprint(model)
        self.perturbation = Perturbation(model, layout)
        self._base = [weight.detach().clone() for weight in self.weights]
        self._anchor = self._base
        self._folded: tuple[bytes, ...] = ()
        self._open: PoolCoefficients | None = None
        self._start: list[torch.Tensor] | None = None
        self._holds: bytes | None = Coefficients(()).digest(self.fingerprint)
        self._directions: dict[Pool, Directions] = {}

    def directions(self, pool: Pool) -> Directions:
        """The directions of `pool` over this model (kernels prepared once; the two newest pools are kept)."""
        if pool not in self._directions:
            while len(self._directions) > 1:
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
        if digest == self._holds:
            return digest
        closed, newest = coefficients.pools[:-1], coefficients.pools[-1:]
        self._fold(closed)
        self._add_open(newest[0] if newest else None)
        self._holds = digest
        return digest

    def _fold(self, closed: tuple[PoolCoefficients, ...]) -> None:
        """Make the anchor w0 plus all closed pools, in float32 sums, going on from the pools that it already has."""
        wanted = tuple(pool.identity for pool in closed)
        if wanted == self._folded:
            return
        self._start = None
        if wanted[: len(self._folded)] != self._folded:
            self._anchor, self._folded = self._base, ()
        for pool in closed[len(self._folded) :]:
            if self._anchor is self._base:
                self._anchor = [tensor.float().clone() for tensor in self._base]
            self.directions(pool.pool).combine(self._anchor, self._anchor, pool.values)
        self._folded = wanted

    def _add_open(self, pool: PoolCoefficients | None) -> None:
        """Write round(anchor + C.z) into the live weights; where that is slow, keep a copy for the next client."""
        targets = [weight.data for weight in self.weights]
        if pool is None or pool.is_zero:
            _copy(self._anchor, targets)
            self._start = None
        elif self._start is not None and self._open is not None and self._open.identity == pool.identity:
            _copy(self._start, targets)
        else:
            directions = self.directions(pool.pool)
            directions.combine(self._anchor, targets, pool.values)
            self._start = None if directions.family.fast_combine else [target.clone() for target in targets]
        self._open = pool


def _copy(source: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    for before, target in zip(source, targets, strict=True):
        target.copy_(before)
