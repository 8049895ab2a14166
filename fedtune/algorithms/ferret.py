"""Ferret: first-order local steps, whose sum is sent as coordinates along random directions, block by block.

Source: Shu et al., "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", ICML 2025, arXiv
2409.06277. With E[z z^T] = I the paper's scaled bases become, for block l with d_l parameters and K_l coordinates,

    g[l,k] = <z[l,k], delta_l>         sent by the client, delta_l its local update of the block
    delta_l ~ s_l * sum_k g[l,k] z[l,k]     rebuilt by everybody, s_l = 1/K_l (unbiased) or 1/(K_l + d_l) (least error)

The relative error of the unbiased rebuild is sqrt(d_l / K_l). Every client uses K_l seeds of the pool of its own
(derived from its named stream, not sent), so that the errors of different clients average out, down to the error that
all P seeds of the pool together would leave. With coordinates = shared all clients use the same K_l seeds, which the
server chooses: a round's mean update is then K numbers on the way down too, at the price of that averaging.

The official code (allen4747/Ferret) departs from the paper; the settings called "official" follow the code, see
docs/fidelity.md. With v = z / sqrt(3 d_l) and its coordinate c = -<delta_l, v> d_l / K_l it subtracts server_lr * c * v,
which is server_lr * 1/(3 K_l) * g z: a third of the update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from fedtune.algorithms.base import Algorithm, LocalWork, State, no_draw_weights, server_rate, shares
from fedtune.algorithms.change import Change
from fedtune.algorithms.coordinates import (
    I64,
    LARGEST_COUNT,
    OFFICIAL_LEAST,
    allocate,
    block_rule,
    coordinates_update,
    mean_norms,
    most_coordinates,
    pool_size,
    shared_counts,
)
from fedtune.algorithms.first_order import descend
from fedtune.coefficients import leading
from fedtune.config import RunConfig
from fedtune.directions.base import F64
from fedtune.errors import MalformedMessageError
from fedtune.layout import Layout
from fedtune.seeds import Stream
from fedtune.wire import Instruction, Kind, Update

NORM_PIECE = 1 << 16  # elements whose squares are summed at once: 512 KiB of float64, which stay in a core's cache
OFFICIAL_PIECE_NORM = 10.0  # a rank-one piece of the rebuild is scaled down to this norm in the official code


def local_update(work: LocalWork, config: RunConfig, instruction: Instruction) -> Update:
    """T steps of `config.optimizer` (the paper: stochastic gradient descent), then the coordinates of w_end - w_start.

    A loss, gradient or weight that is not finite ends the work: the update is empty and says so. After the deadline no
    further step is begun, and the update is that of the steps done.
    """
    change = Change.of(work)
    losses, finite = descend(work, config)
    found = project(work, change, config, instruction) if finite else None
    counts, coordinates = found or _nothing(work, config, instruction)
    return coordinates_update(work, losses, found is not None, counts, coordinates, instruction)


def project(work: LocalWork, change: Change, config: RunConfig, instruction: Instruction) -> tuple[I64, F64] | None:
    """int64 [L] counts K_l and float64 [sum K_l] coordinates of the local update, block by block, seeds ascending.

    Where coordinates of all seeds cost what those of some do, `change` is walked once and they are chosen after it; else
    twice, first for the norms that the choice depends on. None: the change is not finite.
    """
    directions = work.directions
    layout, pool = directions.layout, directions.pool
    squares = np.zeros(layout.blocks)
    once = directions.family.fast_combine
    table = np.zeros(0)
    if once:
        table = directions.project(_measured(change, layout, squares), np.ones((layout.blocks, pool.size), dtype=np.bool_))
    else:
        for _ in _measured(change, layout, squares):
            pass
    if not np.isfinite(squares).all():
        return None
    counts = _counts(np.sqrt(squares), layout, pool.size, config, instruction)
    wanted = chosen_seeds(config, instruction.round, work.client, counts, pool.size)
    if not once:
        table = directions.project(enumerate(change) if directions.family.whole else change.walk(), wanted)
    return counts, table[wanted]


def _measured(change: Change, layout: Layout, squares: F64) -> Iterator[tuple[int, torch.Tensor]]:
    """The walk over `change`; adds the sum of squares of each tensor to its block's. Ends at one that is not finite."""
    for index, delta in change.walk():
        parts = torch.split(delta.reshape(-1), NORM_PIECE)
        square = math.fsum(float(part.double().square_().sum()) for part in parts)
        squares[layout.entries[index].block] += square
        if not math.isfinite(square):
            return
        yield index, delta


def _nothing(work: LocalWork, config: RunConfig, instruction: Instruction) -> tuple[I64, F64]:
    """The counts and coordinates of an update that is zero."""
    layout, size = work.directions.layout, work.directions.pool.size
    counts = _counts(np.zeros(layout.blocks), layout, size, config, instruction)
    return counts, np.zeros(int(counts.sum()))


def _counts(norms: F64, layout: Layout, size: int, config: RunConfig, instruction: Instruction) -> I64:
    """int64 [L]: as the server asked, or by the client's own `norms`."""
    if instruction.counts.size:
        return instruction.counts.astype(np.int64)
    return allocate(norms, np.array(layout.block_sizes), config.K, size, config.allocation)


def check_update(update: Update, config: RunConfig, layout: Layout) -> None:
    """Refuse counts that no `allocate` gives, where the client chose them.

    Raises:
        MalformedMessageError: other blocks, or more or fewer coordinates than the budget and its update ask for.
    """
    if config.coordinates == "shared":
        return
    sizes, size = np.array(layout.block_sizes), pool_size(config, layout)
    official = config.allocation == "official"
    caps = np.minimum(np.full(len(sizes), size) if official else np.minimum(sizes, size), LARGEST_COUNT)
    block = int(np.argmax(update.counts - caps))
    if update.counts[block] > caps[block]:
        raise MalformedMessageError(
            f"Block {block} has {update.counts[block]} coordinates, of {caps[block]} at most.", block=block
        )
    if official:
        if (update.counts < OFFICIAL_LEAST).any():
            raise MalformedMessageError(f"A block has fewer than {OFFICIAL_LEAST} coordinates, which each has at least.")
        return
    total, budget = int(update.counts.sum()), most_coordinates(config, layout)
    if not total:
        raise MalformedMessageError("The update has no coordinates: nothing moved, so it has no share (raise lr).")
    full = bool((update.counts == caps)[update.counts > 0].all())
    if total > budget or (total < budget and not full):
        raise MalformedMessageError(f"The update has {total} coordinates; {budget} were asked for.", total=total, budget=budget)


def chosen_seeds(config: RunConfig, round: int, client: str, counts: I64, pool_size: int) -> npt.NDArray[np.bool_]:
    """bool [L, K]: the K_l seeds of each block that a client projects on; derived on both sides, never sent.

    With coordinates = shared they are the first K_l of the pool for everybody.
    """
    if config.coordinates == "shared":
        return leading(counts, pool_size)
    wanted = np.zeros((len(counts), pool_size), dtype=np.bool_)
    for block, count in enumerate(counts.tolist()):
        wanted[block, Stream(config.seed, "coordinates", round, client, block).subset(pool_size, count)] = True
    return wanted


def scales(counts: I64, sizes: I64, reconstruction: str) -> F64:
    """float64 [L]: what a coordinate is multiplied with: 1/K_l, 1/(K_l + d_l) (least error) or 1/(3 K_l) (official code)."""
    divisor = {"unbiased": counts, "shrunken": counts + sizes, "official": 3 * counts}[reconstruction]
    return np.asarray(1.0 / np.maximum(divisor, 1))


def clip_pieces(values: F64, sizes: I64) -> F64:
    """float64 [L, K]: `values` with every piece values[l, k] z[l, k] scaled down to norm OFFICIAL_PIECE_NORM at most.

    ||z[l, k]|| is taken as sqrt(d_l), its value for signs. The official code takes that of each base, which differs by a
    relative sqrt(1 / (5 d_l)) or so: 1 % at d_l = 2000.
    """
    limits = OFFICIAL_PIECE_NORM / np.sqrt(sizes)[:, None]
    return np.asarray(np.clip(values, -limits, limits))


def aggregate(state: State, updates: Mapping[str, Update], config: RunConfig, layout: Layout) -> State:
    """C <- C + server_lr * M,  M <- momentum * M + sum_i c_i s_i g_i, clients in sorted order, at least one.

    This is also what the official code's momentum does: it decays the summed coordinates (`*= momentum`), adds those of
    the round, and applies the sum to the model of the round before.
    """
    sizes = np.array(layout.block_sizes)
    step = np.zeros(state.values.shape)
    for client, share in shares(updates, config).items():
        update = updates[client]
        wanted = chosen_seeds(config, update.round, client, update.counts, state.pool.size)
        dense = np.zeros_like(step)
        dense[wanted] = update.scalars.astype(np.float64)
        step += share * scales(update.counts, sizes, config.reconstruction)[:, None] * dense
    velocity = config.momentum * state.statistics["velocity"] + step
    applied = clip_pieces(velocity, sizes) if config.reconstruction == "official" else velocity
    number = next(iter(updates.values())).round  # the server's round, which counts empty ones too
    values = state.values + server_rate(config, number) * applied
    statistics = {**state.statistics, "velocity": velocity}
    if config.coordinates == "shared":
        counts = next(iter(updates.values())).counts
        before = state.statistics["norms"][:, 0]
        found = mean_norms(step, counts, scales(counts, sizes, config.reconstruction), before)
        statistics["norms"] = found[:, None]
    return replace(state, round=state.round + 1, values=values, statistics=statistics)


FERRET = Algorithm(
    name="ferret",
    kind=Kind.COORDINATES,
    block_rule=block_rule,
    pool_size=pool_size,
    statistics=lambda blocks, size: {"velocity": np.zeros((blocks, size)), "norms": np.zeros((blocks, 1))},
    draw_weights=no_draw_weights,
    most_numbers=most_coordinates,
    local_update=local_update,
    aggregate=aggregate,
    counts=shared_counts,
    check_update=check_update,
    lasting=("norms",),
)
