"""A client's zeroth-order steps: slopes from two forward passes each, along directions that the caller names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedtune.algorithms.base import LocalWork
from fedtune.bits import round_scalars
from fedtune.config import RunConfig
from fedtune.directions.base import F32
from fedtune.progress import ClientStep, check_stop, emit
from fedtune.wire import Status


@dataclass(frozen=True, eq=False)
class Walked:
    """What the steps measured: float32 [steps * P] slopes in order, the loss of each step, and how they ended."""

    scalars: F32
    losses: list[float]
    status: Status


def walk(work: LocalWork, config: RunConfig, seeds: npt.NDArray[np.int64], bits: int) -> Walked:
    """tau steps of  w <- w - lr/P * sum_k g_k z_k  over P seeds,  g_k = (L(w + eps z_k) - L(w - eps z_k)) / (2 eps).

    All P slopes of a step are measured at the same w, on the same batch. The first step with a loss or slope that is not
    finite ends the work, is not counted, and is reported. So does the deadline, with the steps done as update.

    Args:
        seeds: int64 [tau * P] in the pool of `work.directions`.
        bits: to which g is rounded before it is applied (32: not).
    """
    rate = config.lr / config.directions_per_step
    scalars: list[np.float32] = []
    losses: list[float] = []
    status = Status.FINISHED
    for step, ks in enumerate(seeds.reshape(config.local_steps, config.directions_per_step).tolist()):
        check_stop()
        if not work.in_time(step):
            break
        gradients, loss = two_point(work, ks, config.eps)
        rounded = round_scalars(np.array(gradients, dtype=np.float32), bits)
        if not (np.isfinite(rounded).all() and np.isfinite(loss)):
            status = Status.NOT_FINITE
            break
        work.live.move(work.directions, [(k, -rate * gradient) for k, gradient in zip(ks, rounded.tolist(), strict=True)])
        scalars.extend(rounded)
        losses.append(loss)
        emit(ClientStep(work.client, step + 1, config.local_steps, loss))
    work.live.settle()
    return Walked(np.array(scalars, dtype=np.float32), losses, status)


@torch.no_grad()
def two_point(work: LocalWork, ks: Sequence[int], eps: float) -> tuple[list[float], float]:
    """(P scalar gradients, mean loss) of the next batch along directions `ks`.

    Each takes two evaluations, at w + eps z and w - eps z.
    """
    found = work.losses_at(next(work.batches), [(k, c) for k in ks for c in (eps, -eps)])
    pairs = list(zip(found[::2], found[1::2], strict=True))
    gradients = [(plus - minus) / (2.0 * eps) for plus, minus in pairs]
    return gradients, sum((plus + minus) / 2.0 for plus, minus in pairs) / len(pairs)
