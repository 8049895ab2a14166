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

The rate: lr is the norm of a block's step relative to the norm of its weights in the base model. It does not depend on K, d or
the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import Parameter

from fedtune.algorithms.base import Algorithm, LocalWork, State, no_draw_weights, server_rate, shares
from fedtune.algorithms.coordinates import I64, block_rule, most_coordinates, pool_size, shared_counts
from fedtune.config import RunConfig
from fedtune.directions.base import F64
from fedtune.layout import Layout
from fedtune.progress import ClientStep, check_stop, emit
from fedtune.wire import Instruction, Kind, Status, Update

BETAS = (0.9, 0.99)  # of adamw: a round has tens of steps, and begins afresh
LEAST_SCALE = 1e-3  # a block's weights count as at least so large in the root mean square: biases begin at zero
TINY = 1e-30  # keeps a block without any gradient from dividing by zero


class Optimizer:
    """Steps of coordinates, scaled so that lr is relative to the weights.

    With g the gradient of a block's coordinates,

        sgd:       u = g / rms(g)
        momentum:  u <- local_momentum u + (1 - local_momentum) g / rms(g)
        adamw:     u = m / sqrt(v),  m and v running means of g and g^2 of each coordinate (0.9, 0.99), without bias

    and  c <- c - lr rms(w_l) / sqrt(K_l) u.  Directions have norm sqrt(d_l) and hardly overlap, so that is a step of norm
    lr ||w_l|| if the root mean square of u is 1, as it is with sgd: every batch moves every block as far.

    Args:
        scales: float64 [L], root mean square of each block's weights.
        counts: int64 [L], K_l.
        wanted: bool [L, K], the coordinates that are trained.
    """

    def __init__(self, config: RunConfig, scales: F64, counts: I64, wanted: npt.NDArray[np.bool_]) -> None:
        self.rule, self.keep = config.optimizer, config.local_momentum
        self.counts = np.maximum(counts, 1)[:, None]
        self.rates = config.lr * np.maximum(scales, LEAST_SCALE)[:, None] / np.sqrt(self.counts)
        self.coordinates = np.zeros(wanted.shape)
        self._mean, self._square = np.zeros(wanted.shape), np.zeros(wanted.shape if self.rule == "adamw" else (1, 1))
        self._steps = 0

    def step(self, gradient: F64) -> F64:
        """float64 [L, K]: the coordinates after a step along `gradient` (float64 [L, K]), which is zero where not wanted."""
        self._steps += 1
        moves = {"sgd": self._normalised, "momentum": self._momentum, "adamw": self._adamw}
        self.coordinates = self.coordinates - self.rates * moves[self.rule](gradient)
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


class Gradients:
    """The gradient of a loss in coordinates; that of the weights is projected tensor by tensor and freed in the backward pass.

    >>> with Gradients(work, wanted) as gradients:  # doctest: +SKIP
    ...     loss, found = gradients.take(1)
    """

    def __init__(self, work: LocalWork, wanted: npt.NDArray[np.bool_]) -> None:
        self.work, self.wanted = work, wanted
        self._whole = work.directions.family.whole
        self._rows: list[F64] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for index, weight in enumerate(self.work.weights):
            weight.grad = None
            if not self._whole:
                arrived = partial(self._arrived, index)
                self._handles.append(weight.register_post_accumulate_grad_hook(arrived))  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for weight in self.work.weights:
            weight.grad = None

    def take(self, batches: int) -> tuple[float, F64] | None:
        """(mean loss, float64 [L, K]) over so many batches; None if it is not finite."""
        layout, total = self.work.directions.layout, 0.0
        self._rows = [np.zeros(self.wanted.shape[1]) for _ in self.work.weights]
        for _ in range(batches):
            loss = self.work.loss(self.work.model, next(self.work.batches)) / batches
            total += float(loss.detach())
            if not math.isfinite(total):
                return None
            loss.backward()  # type: ignore[no-untyped-call]
        if self._whole:
            return self._checked(total, self._at_once())
        gradient = np.zeros(self.wanted.shape)
        for entry, row in zip(layout.entries, self._rows, strict=True):  # in the order of the layout, not of arrival
            gradient[entry.block] += row
        return self._checked(total, gradient)

    def _arrived(self, index: int, weight: Parameter) -> None:
        """Called in the backward pass when the gradient of a tensor, tied uses included, is complete."""
        gradient, weight.grad = weight.grad, None
        directions = self.work.directions
        wanted = self.wanted[directions.layout.entries[index].block]
        if gradient is not None and wanted.any():
            directions.accumulate(self._rows[index], index, gradient, wanted)

    def _at_once(self) -> F64:
        """For a family whose directions are drawn as a whole: from all gradients together."""
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.work.weights]
        found = self.work.directions.project(enumerate(gradients), self.wanted)
        for weight in self.work.weights:
            weight.grad = None
        return found

    @staticmethod
    def _checked(loss: float, gradient: F64) -> tuple[float, F64] | None:
        return (loss, gradient) if np.isfinite(gradient).all() else None


def trained(counts: I64, pool_size: int) -> npt.NDArray[np.bool_]:
    """bool [L, K]: the first K_l of the pool in every block, for everybody."""
    return np.asarray(np.arange(pool_size) < counts[:, None])


def local_update(work: LocalWork, config: RunConfig, instruction: Instruction) -> Update:
    """T steps; the update is the coordinates after the last one.

    A loss or gradient that is not finite ends the work: the update is empty and says so. After the deadline no further step is
    begun, and the update is that of the steps done.
    """
    assert work.moves is not None, "training in the subspace needs a replica"
    counts = instruction.counts.astype(np.int64)
    wanted = trained(counts, work.directions.pool.size)
    optimizer = Optimizer(config, work.moves.scales, counts, wanted)
    losses: list[float] = []
    status = Status.FINISHED
    with Gradients(work, wanted) as gradients:
        for step in range(config.client_steps):
            check_stop()
            if not work.in_time(step):
                break
            found = gradients.take(config.accumulate)
            if found is None:
                status = Status.NOT_FINITE
                break
            losses.append(found[0])
            work.moves.move(optimizer.step(found[1]))
            emit(ClientStep(work.client, step + 1, config.client_steps, found[0]))
    coordinates = optimizer.coordinates if status == Status.FINISHED else np.zeros(wanted.shape)
    return Update(
        round=instruction.round,
        digest=instruction.digest,
        status=status,
        steps=len(losses),
        examples=work.examples,
        train_loss=float(np.mean(losses)) if losses else 0.0,
        scalars=coordinates[wanted].astype(np.float32),
        counts=counts,
    )


def aggregate(state: State, updates: Mapping[str, Update], config: RunConfig, layout: Layout) -> State:
    """C <- C + server_lr * sum_i share_i c_i, clients in sorted order, at least one."""
    first = next(iter(updates.values()))
    wanted = trained(first.counts, state.pool.size)
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
