"""DeComFL: the seeds of a round are new and the same for everybody, so that a step costs P scalars in both directions.

Source: Li et al., "Achieving Dimension-Free Communication in Federated Learning via Zeroth-Order Optimization", ICLR 2025,
arXiv 2405.15861. In round r every client does the steps s = 1 .. tau with the same P fresh directions each,

    w_i <- w_i - lr/P * sum_p g_i[s,p] z[r,s,p],    g = (L(w + eps z) - L(w - eps z)) / (2 eps)

sends its tau P scalars and forgets its steps; everybody moves by the means of the scalars,

    w <- w - lr/P * sum_s sum_p (sum_i c_i g_i[s,p]) z[r,s,p]

which is also what a client that missed rounds replays. A round's seeds are a pool of tau P directions (`pool_every` is 1),
of which step s uses the numbers (s-1) P .. s P - 1; the history of scalars is the finished pools.

The paper's g is the forward difference (L(w + eps z) - L(w)) / eps with one evaluation more for each step and not for each
direction; ours is FedKSeed's, of second order in eps, so that the methods differ in their seeds only. The paper weights
clients equally (`weighting = equal`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedtune.algorithms.base import Algorithm, LocalWork, State, no_draw_weights, no_statistics, shares
from fedtune.algorithms.fedkseed import scalar_update
from fedtune.algorithms.zeroth_order import walk
from fedtune.config import RunConfig
from fedtune.layout import Layout
from fedtune.wire import Instruction, Kind, Update


def local_update(work: LocalWork, config: RunConfig, instruction: Instruction) -> Update:
    """tau steps along the round's directions in their order; the g that is applied is the g that is sent."""
    seeds = np.arange(config.local_steps * config.directions_per_step)
    return scalar_update(work, walk(work, config, seeds, config.scalar_bits), instruction)


def aggregate(state: State, updates: Mapping[str, Update], config: RunConfig, layout: Layout) -> State:
    """C_k = -lr/P * sum_i c_i g_i[k], clients in sorted order.

    A client that ran out of time has no slope along the last directions, and the others' count alone there.
    """
    sums, weights = np.zeros(state.pool.size), np.zeros(state.pool.size)
    for client, share in shares(updates, config).items():
        scalars = updates[client].scalars.astype(np.float64)
        sums[: len(scalars)] += share * scalars
        weights[: len(scalars)] += share
    mean = sums / np.where(weights > 0.0, weights, 1.0)
    values = state.values.copy()
    values[0] -= config.lr / config.directions_per_step * mean
    return replace(state, round=state.round + 1, values=values)


DECOMFL = Algorithm(
    name="decomfl",
    kind=Kind.SCALARS,
    block_rule=lambda config: "one",
    pool_size=lambda config, layout: config.local_steps * config.directions_per_step,
    statistics=no_statistics,
    draw_weights=no_draw_weights,
    most_numbers=lambda config, layout: config.local_steps * config.directions_per_step,
    local_update=local_update,
    aggregate=aggregate,
)
