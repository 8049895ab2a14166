"""FedKSeed and FedKSeed-Pro: zeroth-order steps along directions from a pool of K seeds.

Source: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes", ICML 2024, arXiv 2312.06353. The model of the server is

    w = w0 - lr * sum_k A_k z_k,        C_k = -lr * A_k

where A_k accumulates the scalar gradients that clients measured along z_k, weighted by the clients' shares. A step that
measures P slopes (`directions_per_step`; the paper: 1) moves along all P directions and counts each by 1/P.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedtune.algorithms.base import Algorithm, LocalWork, State, no_draw_weights, no_statistics, shares
from fedtune.algorithms.zeroth_order import Walked, walk
from fedtune.config import RunConfig
from fedtune.directions.base import F64
from fedtune.elementary import exp
from fedtune.layout import Layout
from fedtune.seeds import Stream
from fedtune.wire import Instruction, Kind, Update

PRO_CLIP = 1000.0  # scalar gradients count up to this size in FedKSeed-Pro's statistics (official code)
DRAW_SCALE = 65535  # the most likely seed has this draw weight


def drawn_seeds(
    config: RunConfig, round: int, client: str, pool_size: int, weights: npt.NDArray[np.uint16], most: int | None = None
) -> npt.NDArray[np.int64]:
    """int64 [tau * P]: the seeds of a client's local steps, P = `directions_per_step` for each, drawn with replacement.

    Client and server derive them from the same named stream, so they are never sent.

    Args:
        weights: uint16 [K] as whole-number probabilities (FedKSeed-Pro), or empty for uniform (FedKSeed).
        most: how many are drawn at most, the first of them; None: all.
    """
    stream, count = Stream(config.seed, "steps", round, client), config.local_steps * config.directions_per_step
    count = count if most is None else min(count, most)
    if weights.size:
        return stream.weighted(weights.astype(np.int64), count)
    return stream.below(pool_size, count)


def local_update(work: LocalWork, config: RunConfig, instruction: Instruction) -> Update:
    """tau steps along drawn seeds (see `walk`).

    The g that is applied is the g that is sent (rounded to `scalar_bits`), so the server's replay follows the client's own
    path.
    """
    seeds = drawn_seeds(config, instruction.round, work.client, work.directions.pool.size, instruction.draw_weights)
    return scalar_update(work, walk(work, config, seeds, config.scalar_bits), instruction)


def scalar_update(work: LocalWork, walked: Walked, instruction: Instruction) -> Update:
    """The slopes as the update that answers `instruction`."""
    return Update(
        round=instruction.round,
        digest=instruction.digest,
        status=walked.status,
        steps=len(walked.losses),
        examples=work.examples,
        train_loss=float(np.mean(walked.losses)) if walked.losses else 0.0,
        scalars=walked.scalars,
        counts=np.zeros(0, dtype=np.int64),
    )


def aggregate(state: State, updates: Mapping[str, Update], config: RunConfig, layout: Layout) -> State:
    """C_k <- C_k - lr/P * sum_i c_i * (sum of client i's scalar gradients along k), clients in sorted order."""
    rate = config.lr / config.directions_per_step
    weights = draw_weights(state) if state.statistics else np.zeros(0, dtype=np.uint16)
    values = state.values.copy()
    statistics = {name: array.copy() for name, array in state.statistics.items()}
    for client, share in shares(updates, config).items():
        update = updates[client]
        seeds = drawn_seeds(config, update.round, client, state.pool.size, weights, len(update.scalars))
        sums = np.zeros(state.pool.size)
        np.add.at(sums, seeds, update.scalars.astype(np.float64))
        values[0] -= rate * share * sums
        if statistics:
            np.add.at(statistics["magnitude"], seeds, np.minimum(np.abs(update.scalars.astype(np.float64)), PRO_CLIP))
            np.add.at(statistics["count"], seeds, 1.0)
    return replace(state, round=state.round + 1, values=values, statistics=statistics)


def probabilities(magnitude: F64, count: F64) -> F64:
    """FedKSeed-Pro's chance of each seed: softmax of the min-max scaled mean size of its scalar gradients.

        s_k = mean |clip(H_k)|, t_k = (s_k - min s) / (max s - min s + 1e-10), p = softmax(t)

    H_k is every scalar that any client measured along z_k, and one initial 0 (official code); clipped to +-1000.

    Args:
        magnitude: float64 [K], sum over H_k of |clip(h)|.
        count: float64 [K], number of measured scalars.
    """
    s = magnitude / (count + 1.0)
    t = (s - s.min()) / (s.max() - s.min() + 1e-10)
    weights = exp(t)  # the same bits wherever the run is replayed
    return np.asarray(weights / weights.sum())


def draw_weights(state: State) -> npt.NDArray[np.uint16]:
    """uint16 [K]: the probabilities as whole numbers, the largest DRAW_SCALE, so that both sides draw exactly alike."""
    p = probabilities(state.statistics["magnitude"], state.statistics["count"])
    return np.asarray(np.rint(p / p.max() * DRAW_SCALE), dtype=np.uint16)


FEDKSEED = Algorithm(
    name="fedkseed",
    kind=Kind.SCALARS,
    block_rule=lambda config: "one",
    pool_size=lambda config, layout: config.K,
    statistics=no_statistics,
    draw_weights=no_draw_weights,
    most_numbers=lambda config, layout: config.local_steps * config.directions_per_step,
    local_update=local_update,
    aggregate=aggregate,
)

FEDKSEED_PRO = replace(
    FEDKSEED,
    name="fedkseed-pro",
    statistics=lambda blocks, size: {"magnitude": np.zeros(size), "count": np.zeros(size)},
    draw_weights=draw_weights,
)
