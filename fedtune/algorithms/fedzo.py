"""FedZO: zeroth-order local steps along directions of the client's own, and every weight travels both ways.

Source: Fang et al., "Communication-Efficient Stochastic Zeroth-Order Optimization for Federated Learning", IEEE Transactions
on Signal Processing 2022, arXiv 2201.09531. A client does tau steps along P fresh directions each,

    w <- w - lr/P * sum_p g_p z_p,    g_p = (L(w + eps z_p) - L(w - eps z_p)) / (2 eps)

and the server averages the changes of the weights, as FedAvg does. Nobody else knows the directions, so the weights have to
travel. The paper draws z from the unit sphere, scales by d, and takes the forward difference; here the family of the settings
has E[z z^T] = I and the difference is central, as for FedKSeed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedtune.algorithms.base import LocalWork
from fedtune.algorithms.change import Change
from fedtune.algorithms.fedavg import FEDAVG, weights_update
from fedtune.algorithms.zeroth_order import walk
from fedtune.config import RunConfig
from fedtune.directions import Directions, Pool
from fedtune.seeds import stream_key
from fedtune.wire import Instruction, Status, Update


def own_pool(config: RunConfig, round: int, client: str) -> Pool:
    """The directions of a client and round, tau P of them."""
    seed = stream_key(config.seed, "own directions", round, client)
    return Pool(config.family, seed, config.local_steps * config.directions_per_step, rank=config.rank)


def local_update(work: LocalWork, config: RunConfig, instruction: Instruction) -> Update:
    """tau steps along the client's own directions in their order, then the change of every weight."""
    pool = own_pool(config, instruction.round, work.client)
    own = replace(work, directions=Directions(work.directions.layout, pool))
    change = Change.of(own)
    walked = walk(own, config, np.arange(pool.size), 32)
    return weights_update(own, change, walked.losses, walked.status == Status.FINISHED, instruction)


FEDZO = replace(FEDAVG, name="fedzo", local_update=local_update)
