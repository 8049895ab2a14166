"""FedAvg: first-order local steps, and every weight travels both ways.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
arXiv 1602.05629. With client i's change delta_i = w_end - w_start after its local steps,

    w <- w + server_lr * sum_i c_i delta_i

which is the weighted mean of the clients' models at server_lr = 1. Directions are the axes (family `axes`), so coefficient k
is what was added to weight k since the base, and the state is that of every other algorithm. The numbers travel as 32 bits, or
as 16 with `scalar_bits` (bfloat16, up) and `coefficient_bits` (whole numbers on one grid, down).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedtune.algorithms.base import Algorithm, LocalWork, State, no_draw_weights, no_statistics, server_rate, shares
from fedtune.algorithms.change import Change
from fedtune.algorithms.first_order import descend
from fedtune.config import RunConfig
from fedtune.directions.base import F32
from fedtune.layout import Layout
from fedtune.pieces import all_finite, release, together
from fedtune.scratch import room
from fedtune.wire import Instruction, Kind, Status, Update


def local_update(work: LocalWork, config: RunConfig, instruction: Instruction) -> Update:
    """The steps of `descend`, then the change of every weight."""
    change = Change.of(work)
    losses, finite = descend(work, config)
    return weights_update(work, change, losses, finite, instruction)


def weights_update(
    work: LocalWork, change: Sequence[torch.Tensor], losses: Sequence[float], finite: bool, instruction: Instruction
) -> Update:
    """The change of the weights as the update that answers `instruction`; an empty one if anything is not finite."""
    delta = flat(change, sum(weight.numel() for weight in work.weights)) if finite else np.zeros(0, dtype=np.float32)
    finite = finite and all_finite(delta)
    return Update(
        round=instruction.round,
        digest=instruction.digest,
        status=Status.FINISHED if finite else Status.NOT_FINITE,
        steps=len(losses),
        examples=work.examples,
        train_loss=float(np.mean(losses)) if losses else 0.0,
        scalars=delta if finite else np.zeros(0, dtype=np.float32),
        counts=np.zeros(0, dtype=np.int64),
        weights=True,
    )


def flat(tensors: Sequence[torch.Tensor], size: int) -> F32:
    """float32 [size]: the tensors in order, one after another, on the host."""
    out, end = room((size,), np.float32), 0
    for tensor in tensors:
        values = tensor.reshape(-1).float().cpu().numpy()
        out[end : end + values.size] = values
        end += values.size
        release(out)
    return out


def aggregate(state: State, updates: Mapping[str, Update], config: RunConfig, layout: Layout) -> State:
    """C <- C + server_lr * sum_i c_i delta_i, clients in sorted order, summed in float64 and kept in float32."""
    rate = server_rate(config, next(iter(updates.values())).round)  # the server's round, which counts empty ones too
    counted = {client: rate * share for client, share in shares(updates, config).items()}
    values = room(state.values.shape, state.values.dtype)
    with np.errstate(over="ignore"):  # what does not fit float32 is infinite, and refused where it is published
        changes = [updates[client].scalars for client in counted]
        for _, (after, before, *parts) in together([values[0], state.values[0], *changes]):
            moved = before.astype(np.float64)
            for weight, change in zip(counted.values(), parts, strict=True):
                moved += weight * change.astype(np.float64)
            after[:] = moved
    return replace(state, round=state.round + 1, values=values)


FEDAVG = Algorithm(
    name="fedavg",
    kind=Kind.WEIGHTS,
    block_rule=lambda config: "one",
    pool_size=lambda config, layout: layout.numel,
    statistics=no_statistics,
    draw_weights=no_draw_weights,
    most_numbers=lambda config, layout: layout.numel,
    local_update=local_update,
    aggregate=aggregate,
    family="axes",
)
