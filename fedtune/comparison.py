"""Two models over one base, compared by their coefficients alone: how far each moved, and in which common direction.

    <a, b> = sum_l d_l sum_k a[l,k] b[l,k]        d_l: parameters of block l

is the expected inner product of the changes of the weights, since E[z z^T] = I. Pools of different seeds have independent
directions, so what one model moved along one of them and the other along another counts as orthogonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.coefficients import PoolCoefficients
from fedtune.delta import Delta, encode
from fedtune.delta_reader import read
from fedtune.directions.base import F64
from fedtune.errors import DeltaMismatchError
from fedtune.run_folder import RunFolder
from fedtune.trust import COMPARE


@dataclass(frozen=True)
class Difference:
    """Two changes of the same weights, or of a block of them.

    Attributes:
        norm_a, norm_b: expected Euclidean norms of the two changes.
        cosine: of the angle between them; None if one of them is nothing.
        distance: norm of their difference.
    """

    norm_a: float
    norm_b: float
    cosine: float | None
    distance: float


@dataclass(frozen=True)
class PoolDifference:
    """What two models have of one pool number.

    Attributes:
        number: of the pool in its run; rounds: the first and last round that added to it, of the model that has it.
        shared: whether both have coefficients of the same directions.
        whole: over all blocks; blocks: one by one.
    """

    number: int
    rounds: tuple[int, int]
    shared: bool
    whole: Difference
    blocks: tuple[Difference, ...]


@dataclass(frozen=True)
class Comparison:
    """Two models over the same base: `whole`, and pool by pool; bytes of each as a delta."""

    a: Delta
    b: Delta
    whole: Difference
    pools: tuple[PoolDifference, ...]
    bytes_a: int
    bytes_b: int


def delta_at(place: Path) -> Delta:
    """The delta in a file, or of the last round of a run folder. Raises DeltaError, or as `delta_of_run` does."""
    if not place.is_dir():
        return read(place)
    from fedtune.export import delta_of_run  # brings transformers, which files do without

    return delta_of_run(RunFolder.open(place), ways=COMPARE)


def compare(a: Delta, b: Delta) -> Comparison:
    """The comparison. Raises DeltaMismatchError if the base models or the blocks are not the same."""
    if a.fingerprint != b.fingerprint:
        raise DeltaMismatchError(
            f"The two have different base models, '{a.base}' ({a.fingerprint.hex()}) and '{b.base}' ({b.fingerprint.hex()}): "
            "only models over one base can be compared."
        )
    if a.layout != b.layout:
        raise DeltaMismatchError(
            f"The two divide the parameters into other blocks ({a.block_rule}: {len(a.block_sizes)}, {b.block_rule}: "
            f"{len(b.block_sizes)}): compare runs with the same algorithm and blocks."
        )
    sizes = np.array(a.block_sizes, dtype=np.float64)
    mine, theirs = dict(zip(a.numbers, a.pools, strict=True)), dict(zip(b.numbers, b.pools, strict=True))
    pools, products = [], np.zeros((3, len(sizes)))
    for number in sorted({*mine, *theirs}):
        one, other = mine.get(number), theirs.get(number)
        inner = _products(one, other, sizes)
        products += inner
        rounds = (a if one is not None else b).rounds_of(number)
        shared = one is not None and other is not None and one.pool == other.pool
        pools.append(PoolDifference(number, rounds, shared, _difference(inner.sum(axis=1)), tuple(map(_difference, inner.T))))
    return Comparison(a, b, _difference(products.sum(axis=1)), tuple(pools), len(encode(a)), len(encode(b)))


def _products(one: PoolCoefficients | None, other: PoolCoefficients | None, sizes: F64) -> F64:
    """float64 [3, L]: <a, a>, <b, b> and <a, b> of each block."""
    products = np.zeros((3, len(sizes)))
    if any(pool is not None and pool.pool.disjoint for pool in (one, other)):
        sizes = np.ones_like(sizes)  # axes have norm 1
    for row, pool in enumerate((one, other)):
        if pool is not None:
            products[row] = sizes * np.square(pool.values.astype(np.float64)).sum(axis=1)
    if one is not None and other is not None and one.pool == other.pool:
        products[2] = sizes * (one.values.astype(np.float64) * other.values).sum(axis=1)
    return products


def _difference(products: F64) -> Difference:
    aa, bb, ab = (float(value) for value in products)
    scale = math.sqrt(aa) * math.sqrt(bb)
    cosine = max(-1.0, min(1.0, ab / scale)) if scale else None
    return Difference(math.sqrt(aa), math.sqrt(bb), cosine, math.sqrt(max(0.0, aa + bb - 2.0 * ab)))
