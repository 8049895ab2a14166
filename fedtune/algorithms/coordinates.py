"""Coordinates of a round: how many numbers each block of parameters gets, and how large a pool they are chosen from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedtune.algorithms.base import LocalWork, State
from fedtune.config import RunConfig
from fedtune.directions.base import F64
from fedtune.layout import BlockRule, Layout
from fedtune.wire import Instruction, Status, Update

I64 = npt.NDArray[np.int64]
LARGEST_COUNT = 65535  # counts travel as 16-bit numbers
LEAST_NORM = 0.01  # of the largest block's norm: what a block counts for at least where the server divides K
OFFICIAL_LEAST = 2  # coordinates of any block in Ferret's official code, also of one that did not move
OFFICIAL_FLOOR = 1e-8  # the largest norm counts as at least this in the official code


def shared_counts(state: State, config: RunConfig, layout: Layout) -> I64:
    """int64 [L]: with coordinates = shared, how the server divides K: by the norms of the last round's mean update.

    They are measured in its coordinates (`mean_norms`). Before the first round the norm of a block is taken in
    proportion to sqrt(d_l), and a block never counts for less than LEAST_NORM of the largest, so that it is seen again.
    """
    if config.coordinates == "own":
        return np.zeros(0, dtype=np.int64)
    sizes = np.array(layout.block_sizes)
    norms = state.statistics["norms"][:, 0]
    largest = float(norms.max(initial=0.0))
    guess = np.maximum(norms, LEAST_NORM * largest) if largest else np.sqrt(sizes)
    return allocate(guess, sizes, config.K, state.pool.size, config.allocation)


def mean_norms(step: F64, counts: I64, scale: F64, before: F64) -> F64:
    """float64 [L]: norms of the clients' mean update, from its coordinates: E <z, delta>^2 = ||delta||^2.

    Args:
        step: float64 [L, K], the mean of the clients' coordinates, each times its block's scale.
        counts, scale: [L], coordinates and scale of each block.
        before: float64 [L], kept where a block had no coordinates.
    """
    squares = np.square(step / scale[:, None]).sum(axis=1) / np.maximum(counts, 1)
    return np.asarray(np.where(counts > 0, np.sqrt(squares), before))


def allocate(norms: F64, sizes: I64, total: int, pool_size: int, rule: str) -> I64:
    """Divide `total` coordinates over the blocks: K_l in proportion to the rule's weight, at most min(pool_size, d_l).

    norm (the paper): ||delta_l||. norm-sqrt-size: ||delta_l|| sqrt(d_l), which minimises the expected squared error
    sum_l ||delta_l||^2 d_l / K_l under sum_l K_l = total. uniform: all equal. A block that did not move gets none.
    official (Ferret's code): no total, but K_l = max(int(||delta_l|| / largest norm * pool_size), 2).

    Args:
        norms: float64 [L], norms of the blocks' updates.
        sizes: int64 [L], parameters in each block.

    Returns:
        int64 [L], summing to `total`, or to less if all blocks that moved are full.
    """
    if rule == "official":
        part = norms / max(float(norms.max(initial=0.0)), OFFICIAL_FLOOR)
        return np.clip((part * pool_size).astype(np.int64), OFFICIAL_LEAST, min(pool_size, LARGEST_COUNT))
    weights = {"norm": norms, "norm-sqrt-size": norms * np.sqrt(sizes), "uniform": (norms > 0).astype(np.float64)}[rule]
    caps = np.where(weights > 0, np.minimum(np.minimum(sizes, pool_size), LARGEST_COUNT), 0)
    counts = np.zeros(len(sizes), dtype=np.int64)
    open_blocks = weights > 0
    left = total
    while left > 0 and open_blocks.any():  # hand out in proportion; what full blocks cannot take goes to the others
        share = np.where(open_blocks, weights, 0.0)
        ideal = share / share.sum() * left
        grant = np.minimum(np.floor(ideal).astype(np.int64), caps - counts)
        if not grant.any():
            order = np.argsort(-(ideal - np.floor(ideal)), kind="stable")
            order = order[open_blocks[order]][:left]
            grant = np.zeros_like(counts)
            grant[order] = 1
        counts += grant
        left = total - int(counts.sum())
        open_blocks = (weights > 0) & (counts < caps)
    return counts


def coordinates_update(
    work: LocalWork, losses: Sequence[float], finite: bool, counts: I64, coordinates: F64, instruction: Instruction
) -> Update:
    """float64 [sum of `counts`] coordinates as the update that answers `instruction`."""
    return Update(
        round=instruction.round,
        digest=instruction.digest,
        status=Status.FINISHED if finite else Status.NOT_FINITE,
        steps=len(losses),
        examples=work.examples,
        train_loss=float(np.mean(losses)) if losses else 0.0,
        scalars=coordinates.astype(np.float32),
        counts=counts,
    )


def most_coordinates(config: RunConfig, layout: Layout) -> int:
    """Coordinates that a client sends in a round at most."""
    size = pool_size(config, layout)
    if config.allocation == "official":
        return layout.blocks * min(size, LARGEST_COUNT)
    return min(config.K, sum(min(block, size, LARGEST_COUNT) for block in layout.block_sizes))


def pool_size(config: RunConfig, layout: Layout) -> int:
    """Seeds that every block can choose from: `pool_size`, or room for four times an equal share of K, at most K.

    With the official allocation K itself is the size of the pool.
    """
    if config.pool_size:
        return config.pool_size
    if config.allocation == "official":
        return config.K
    equal = -(-config.K // layout.blocks)
    return min(config.K, 1 << (4 * equal - 1).bit_length())


def block_rule(config: RunConfig) -> BlockRule:
    """Which parameters share coefficients."""
    return "grouped" if config.blocks == "auto" else config.blocks
