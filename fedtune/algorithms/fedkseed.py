"""FedKSeed and FedKSeed-Pro: zeroth-order steps along directions from a pool of K seeds.

Source: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes", ICML 2024, arXiv 2312.06353. The model of the server is

    w = w0 - lr * sum_k A_k z_k,        C_k = -lr * A_k

where A_k accumulates the scalar gradients that clients measured along z_k, weighted by the clients' shares. A step that
measures P slopes (`directions_per_step`; the paper: 1) moves along all P directions and counts each by 1/P.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from fedtune.algorithms.base import Algorithm, LocalWork, State, shares
from fedtune.config import RunConfig
from fedtune.directions.base import F64
from fedtune.layout import Layout
from fedtune.numbers import round_scalars
from fedtune.progress import ClientStep, check_stop, emit
from fedtune.seeds import Stream
from fedtune.wire import Instruction, Kind, Status, Update

PRO_CLIP = 1000.0  # scalar gradients count up to this size in FedKSeed-Pro's statistics (official code)
DRAW_SCALE = 65535  # the most likely seed has this draw weight


def drawn_seeds(
    config: RunConfig, round: int, client: str, pool_size: int, weights: npt.NDArray[np.uint16]
) -> npt.NDArray[np.int64]:
    """int64 [tau * P]: the seeds of a client's local steps, P = `directions_per_step` for each, drawn with replacement.

    Client and server derive them from the same named stream, so they are never sent.

    Args:
        weights: uint16 [K] as whole-number probabilities (FedKSeed-Pro), or empty for uniform (FedKSeed).
    """
    stream, count = Stream(config.seed, "steps", round, client), config.local_steps * config.directions_per_step
    if weights.size:
        return stream.weighted(weights.astype(np.int64), count)
    return stream.below(pool_size, count)


def local_update(work: LocalWork, config: RunConfig, instruction: Instruction) -> Update:
    """tau steps of  w <- w - lr/P * sum_k g_k z_k  over P seeds,  g_k = (L(w + eps z_k) - L(w - eps z_k)) / (2 eps).

    All P slopes of a step are measured at the same w, on the same batch. The g that is applied is the g that is sent
    (rounded to `scalar_bits`), so the server's replay follows the client's own path. The first step with a loss or slope
    that is not finite ends the work, is not counted, and is reported. So does the deadline, with the steps done as update.
    """
    seeds = drawn_seeds(config, instruction.round, work.client, work.directions.pool.size, instruction.draw_weights)
    rate = config.lr / config.directions_per_step
    scalars: list[np.float32] = []
    losses: list[float] = []
    status = Status.FINISHED
    for step, ks in enumerate(seeds.reshape(config.local_steps, config.directions_per_step).tolist()):
        check_stop()
        if not work.in_time(step):
            break
        gradients, loss = two_point(work, ks, config.eps)
        rounded = round_scalars(np.array(gradients, dtype=np.float32), config.scalar_bits)
        if not (np.isfinite(rounded).all() and np.isfinite(loss)):
            status = Status.NOT_FINITE
            break
        work.live.move(work.directions, [(k, -rate * gradient) for k, gradient in zip(ks, rounded.tolist(), strict=True)])
        scalars.extend(rounded)
        losses.append(loss)
        emit(ClientStep(work.client, step + 1, config.local_steps, loss))
    work.live.settle()
    return Update(
        round=instruction.round,
        digest=instruction.digest,
        status=status,
        steps=len(losses),
        examples=work.examples,
        train_loss=float(np.mean(losses)) if losses else 0.0,
        scalars=np.array(scalars, dtype=np.float32),
        counts=np.zeros(0, dtype=np.int64),
    )


@torch.no_grad()
def two_point(work: LocalWork, ks: Sequence[int], eps: float) -> tuple[list[float], float]:
    """(P scalar gradients, mean loss) of the next batch along directions `ks`.

    Each takes two evaluations, at w + eps z and w - eps z.
    """
    found = work.losses_at(next(work.batches), [(k, c) for k in ks for c in (eps, -eps)])
    pairs = list(zip(found[::2], found[1::2], strict=True))
    gradients = [(plus - minus) / (2.0 * eps) for plus, minus in pairs]
    return gradients, sum((plus + minus) / 2.0 for plus, minus in pairs) / len(pairs)


def aggregate(state: State, updates: Mapping[str, Update], config: RunConfig, layout: Layout) -> State:
    """C_k <- C_k - lr/P * sum_i c_i * (sum of client i's scalar gradients along k), clients in sorted order."""
    rate = config.lr / config.directions_per_step
    weights = draw_weights(state) if state.statistics else np.zeros(0, dtype=np.uint16)
    values = state.values.copy()
    statistics = {name: array.copy() for name, array in state.statistics.items()}
    for client, share in shares(updates, config).items():
        update = updates[client]
        seeds = drawn_seeds(config, update.round, client, state.pool.size, weights)[: len(update.scalars)]
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
    weights = np.exp(t)
    return np.asarray(weights / weights.sum())


def draw_weights(state: State) -> npt.NDArray[np.uint16]:
    """uint16 [K]: the probabilities as whole numbers, the largest DRAW_SCALE, so that both sides draw exactly alike."""
    p = probabilities(state.statistics["magnitude"], state.statistics["count"])
    return np.asarray(np.rint(p / p.max() * DRAW_SCALE), dtype=np.uint16)


def _uniform(state: State) -> npt.NDArray[np.uint16]:
    return np.zeros(0, dtype=np.uint16)


FEDKSEED = Algorithm(
    name="fedkseed",
    kind=Kind.SCALARS,
    block_rule=lambda config: "one",
    pool_size=lambda config, layout: config.K,
    statistics=lambda blocks, size: {},
    draw_weights=_uniform,
    local_update=local_update,
    aggregate=aggregate,
)

FEDKSEED_PRO = replace(
    FEDKSEED,
    name="fedkseed-pro",
    statistics=lambda blocks, size: {"magnitude": np.zeros(size), "count": np.zeros(size)},
    draw_weights=draw_weights,
)
