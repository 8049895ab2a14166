"""Training inside the shared subspace: the coefficients themselves are what a client trains, and what it sends.

The K directions of a round's pool, the same for all clients, span a subspace, block by block. With w_start the model that
the round begins with, a local step is

    g = Z^T grad L(w_start + Z c)      one projection of the gradient
    c <- optimiser(c, g)               its state is K numbers
    w <- w_start + Z c                 one combination, from the base in float32

and c is the update. It is rebuilt by everybody exactly as it was trained, where a projected update (ferret.py) is rebuilt
with a relative error of sqrt(d_l / K_l). All clients have the same coordinates, so the mean update is K numbers too. What is
lost is the part of the gradient outside the subspace; a fresh pool each round gives every part its turn.
docs/subspace.md has the theory and what was measured.

Sources: training in random subspaces (Li et al., arXiv 1804.08838; subspaces drawn anew, Gressmann et al., NeurIPS 2020),
intrinsic dimension of fine-tuning (Aghajanyan et al., arXiv 2012.13255), federated: FedKRSO (arXiv 2602.03019) and
FedSubMuon (arXiv 2609.06073). Ours: directions and grid that make the model of a round the same bits everywhere, coordinates
divided over blocks by what moved, and a rate that is relative to the weights.

The rate: lr is the norm of a block's step relative to the norm of its weights in the base model, as long as the loss is above 1
nat a token. It does not depend on K, d or the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedtune.algorithms.base import Algorithm, LocalWork, State, no_draw_weights, server_rate, shares
from fedtune.algorithms.coordinates import (
    I64,
    block_rule,
    coordinates_update,
    most_coordinates,
    pool_size,
    shared_counts,
)
from fedtune.algorithms.first_order import backward, each_gradient, repeated
from fedtune.coefficients import leading
from fedtune.config import RunConfig
from fedtune.directions.base import F64, Bools
from fedtune.layout import Layout
from fedtune.wire import Instruction, Kind, Update

BETAS = (0.9, 0.99)  # of adamw: a round has tens of steps, and begins afresh
LEAST_SCALE = 1e-3  # a block's weights count as at least so large in the root mean square: biases begin at zero
HELD = 64 << 20  # bytes of gradients that are projected at once, side by side in threads
TINY = 1e-30  # keeps a block without any gradient from dividing by zero


class Optimizer:
    """Steps of coordinates, scaled so that lr is relative to the weights.

    With g the gradient of a block's coordinates,

        sgd:       u = g / rms(g)
        momentum:  u <- local_momentum u + (1 - local_momentum) g / rms(g)
        adamw:     u = m / sqrt(v),  m and v running means of g and g^2 of each coordinate (0.9, 0.99), without bias

    and  c <- c - f lr rms(w_l) / sqrt(K_l) u.  Directions have norm sqrt(d_l) and hardly overlap, so that is a step of norm
    f lr ||w_l|| if the root mean square of u is 1, as it is with sgd: every batch moves every block as far.

    f = min(1, loss), in nats a token: steps become shorter as the loss falls, as with Polyak's rule (Loizou et al., arXiv
    2002.10542). A client that knows its rows would go on at full length: with one kind of answer, until it gives no other.

    Args:
        scales: float64 [L], root mean square of each block's weights.
        counts: int64 [L], K_l.
    """

    def __init__(self, config: RunConfig, scales: F64, counts: I64) -> None:
        self.rule, self.keep = config.optimizer, config.local_momentum
        self.counts = np.maximum(counts, 1)[:, None]
        self.rates = config.lr * np.maximum(scales, LEAST_SCALE)[:, None] / np.sqrt(self.counts)
        self.coordinates = self._mean = self._square = np.zeros((len(counts), 1))  # [L, K] from the first step on
        self._steps = 0

    def step(self, gradient: F64, loss: float) -> F64:
        """float64 [L, K]: the coordinates after a step.

        Args:
            gradient: float64 [L, K], of the coordinates, zero where not wanted.
            loss: mean loss a token of the batch that it is of, in nats.
        """
        self._steps += 1
        moves = {"sgd": self._normalised, "momentum": self._momentum, "adamw": self._adamw}
        near = min(1.0, max(loss, 0.0))
        self.coordinates = self.coordinates - near * self.rates * moves[self.rule](gradient)
        return self.coordinates

    def _normalised(self, gradient: F64) -> F64:
        root = np.sqrt(np.square(gradient).sum(axis=1, keepdims=True) / self.counts)
        return np.asarray(gradient / np.maximum(root, TINY))

    def _momentum(self, gradient: F64) -> F64:
        self._mean = self.keep * self._mean + (1 - self.keep) * self._normalised(gradient)
        return self._mean / (1 - self.keep**self._steps)

    def _adamw(self, gradient: F64) -> F64:
        self._mean = BETAS[0] * self._mean + (1 - BETAS[0]) * gradient
        self._square = BETAS[1] * self._square + (1 - BETAS[1]) * np.square(gradient)
        root = np.sqrt(self._square / (1 - BETAS[1] ** self._steps))
        return np.asarray(self._mean / (1 - BETAS[0] ** self._steps) / np.maximum(root, TINY))


def held_bytes(device: torch.device) -> int:
    """Bytes of gradients that are held to be projected together; 0 where there is nothing to share out."""
    return HELD if device.type == "cpu" and torch.get_num_threads() > 1 else 0


class Gradients:
    """The gradient of a loss in coordinates; that of the weights is projected and freed in the backward pass.

    With several threads on the CPU gradients are held until there are HELD bytes of them, which are projected side by side.

    >>> with Gradients(work, wanted) as gradients:  # doctest: +SKIP
    ...     loss, found = gradients.take(1)
    """

    def __init__(self, work: LocalWork, wanted: Bools) -> None:
        self.work, self.wanted = work, wanted
        self._whole = work.directions.family.whole
        self._rows: list[F64] = []
        self._held: dict[int, Tensor] = {}
        self._bytes = 0
        self._gradients = each_gradient(work.weights, None if self._whole else self._arrived)

    def __enter__(self) -> Self:
        self._gradients.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._gradients.__exit__(kind, error, trace)

    def take(self, batches: int) -> tuple[float, F64] | None:
        """(mean loss, float64 [L, K]) over so many batches; None if it is not finite."""
        self._rows = [np.zeros(self.wanted.shape[1]) for _ in self.work.weights]
        loss = backward(self.work, batches)
        self._project()
        if loss is None:
            return None
        gradient = self._at_once() if self._whole else self._summed()
        return (loss, gradient) if np.isfinite(gradient).all() else None

    def _arrived(self, index: int, gradient: Tensor) -> None:
        if not self.wanted[self.work.directions.layout.entries[index].block].any():
            return
        if index in self._held:  # of the batch before
            self._project()
        self._held[index] = gradient
        self._bytes += gradient.numel() * gradient.element_size()
        if self._bytes >= held_bytes(gradient.device):
            self._project()

    def _project(self) -> None:
        """Those held, each into its own row, whose order of sums depends on the tensor alone."""
        held, self._held, self._bytes = self._held, {}, 0
        directions, indices = self.work.directions, list(held)

        def accumulate(number: int) -> None:
            index = indices[number]
            wanted = self.wanted[directions.layout.entries[index].block]
            directions.accumulate(self._rows[index], index, held[index], wanted)

        directions.over([held[index] for index in indices], accumulate)

    def _summed(self) -> F64:
        """The tensors of a block in the order of the layout, not of arrival."""
        gradient = np.zeros(self.wanted.shape)
        for entry, row in zip(self.work.directions.layout.entries, self._rows, strict=True):
            gradient[entry.block] += row
        return gradient

    def _at_once(self) -> F64:
        """For a family whose directions are drawn as a whole: from all gradients together."""
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.work.weights]
        found = self.work.directions.project(enumerate(gradients), self.wanted)
        for weight in self.work.weights:
            weight.grad = None
        return found


def local_update(work: LocalWork, config: RunConfig, instruction: Instruction) -> Update:
    """T steps; the update is the coordinates after the last one.

    A loss or gradient that is not finite ends the work: the update is empty and says so. After the deadline no further step is
    begun, and the update is that of the steps done.
    """
    assert work.moves is not None, "training in the subspace needs a replica"
    moves, counts = work.moves, instruction.counts.astype(np.int64)
    wanted = leading(counts, work.directions.pool.size)
    optimizer = Optimizer(config, moves.scales, counts)
    with Gradients(work, wanted) as gradients:

        def take() -> float | None:
            found = gradients.take(config.accumulate)
            if found is None:
                return None
            loss, gradient = found
            moves.move(optimizer.step(gradient, loss))
            return loss

        losses, finite = repeated(work, config, take)
    coordinates = optimizer.coordinates if finite else np.zeros(wanted.shape)
    return coordinates_update(work, losses, finite, counts, coordinates[wanted], instruction)


def aggregate(state: State, updates: Mapping[str, Update], config: RunConfig, layout: Layout) -> State:
    """C <- C + server_lr * sum_i share_i c_i, clients in sorted order, at least one."""
    first = next(iter(updates.values()))
    wanted = leading(first.counts, state.pool.size)
    step = np.zeros(state.values.shape)
    for client, share in shares(updates, config).items():
        step[wanted] += share * updates[client].scalars.astype(np.float64)
    values = state.values + server_rate(config, first.round) * step
    norms = np.sqrt(np.array(layout.block_sizes) * np.square(step).sum(axis=1))
    norms = np.where(first.counts > 0, norms, state.statistics["norms"][:, 0])
    return replace(state, round=state.round + 1, values=values, statistics={**state.statistics, "norms": norms[:, None]})


SUBSPACE = Algorithm(
    name="subspace",
    kind=Kind.COORDINATES,
    block_rule=block_rule,
    pool_size=pool_size,
    statistics=lambda blocks, size: {"norms": np.zeros((blocks, 1))},
    draw_weights=no_draw_weights,
    most_numbers=most_coordinates,
    local_update=local_update,
    aggregate=aggregate,
    counts=shared_counts,
    lasting=("norms",),
)
