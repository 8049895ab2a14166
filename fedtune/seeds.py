"""Named random streams: (run seed, purpose, round, client, step) -> the same numbers on every machine, for ever.

numpy's and torch's generators may change their streams between versions and devices, and two sides of a federation
derive the same draws without sending them, so the numbers come from Philox (integers) by the few rules in this file, and
logarithms and the like from `fedtune.elementary`, not from the C library.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from fedtune import elementary, philox

LARGEST_BOUND = 2**56  # a million clients with 2^32 samples each have fewer
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


def stream_key(*name: int | str) -> int:
    """The 64-bit key of the stream called `name`: the first 8 bytes of SHA-256 over its unambiguous spelling."""
    spelled = "".join(f"{type(part).__name__[0]}{len(str(part))}:{part};" for part in name)
    return int.from_bytes(hashlib.sha256(spelled.encode()).digest()[:8], "little")


class Stream:
    """A sequence of random numbers with a name.

    >>> Stream(7, "sample", 1).below(10, 3).tolist() == Stream(7, "sample", 1).below(10, 3).tolist()
    True
    """

    def __init__(self, *name: int | str) -> None:
        self.name = name
        self._key = stream_key(*name)
        self._next = 0

    def words(self, count: int) -> npt.NDArray[np.uint32]:
        """uint32 [count]: the next words."""
        drawn = philox.words(self._key, self._next, count)
        self._next += count
        return drawn

    def words64(self, count: int) -> npt.NDArray[np.uint64]:
        """uint64 [count]: the next pairs of words, low word first."""
        pairs = self.words(2 * count).astype(np.uint64)
        return pairs[0::2] | (pairs[1::2] << np.uint64(32))

    def uniform(self, count: int) -> F64:
        """float64 [count] in [0, 1): the top 53 bits of each 64-bit word."""
        return (self.words64(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, bound: int, count: int) -> I64:
        """int64 [count], uniform in 0 .. bound-1, bound <= LARGEST_BOUND (bias below 2^-8 of a step for any such bound)."""
        if not 1 <= bound <= LARGEST_BOUND:
            raise ValueError(f"bound must be in 1 .. 2^56, not {bound}")
        # floor(word * bound / 2^64) without 128-bit integers: split the word in two halves.
        drawn = self.words64(count)
        low, high = drawn & np.uint64(philox.MASK32), drawn >> np.uint64(32)
        if bound <= 2**32:
            wide = np.uint64(bound)
            return ((high * wide + ((low * wide) >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)
        return np.array([int(word) * bound >> 64 for word in drawn], dtype=np.int64)

    def permutation(self, count: int) -> I64:
        """int64 [count]: 0 .. count-1 in random order (the stable order of 64-bit words)."""
        return np.argsort(self.words64(count), kind="stable").astype(np.int64)

    def subset(self, count: int, size: int) -> I64:
        """int64 [size], ascending: `size` distinct numbers below `count`, each subset equally likely."""
        if not 0 <= size <= count:
            raise ValueError(f"cannot take {size} of {count}")
        return np.sort(self.permutation(count)[:size])

    def weighted(self, weights: I64, count: int) -> I64:
        """int64 [count]: indices drawn with replacement, proportional to whole-number `weights` (exact on every machine).

        The weights sum to LARGEST_BOUND at most.
        """
        ends = np.cumsum(weights)
        return np.searchsorted(ends, self.below(int(ends[-1]), count), side="right").astype(np.int64)

    def weighted_subset(self, weights: I64, size: int) -> I64:
        """int64 [size], ascending: distinct indices drawn one after another, each proportional to the weights left."""
        left = weights.astype(np.int64).copy()
        chosen: list[int] = []
        for _ in range(size):
            index = int(self.weighted(left, 1)[0])
            chosen.append(index)
            left[index] = 0
        return np.array(sorted(chosen), dtype=np.int64)

    def normal(self, count: int) -> F64:
        """float64 [count], standard normal, by the Box-Muller transform."""
        u = self.uniform(2 * count)
        return np.sqrt(-2.0 * elementary.log(1.0 - u[0::2])) * elementary.cosine_of_turns(u[1::2])

    def gamma(self, shape: float, count: int) -> F64:
        """float64 [count] from Gamma(shape, 1).

        Source: Marsaglia and Tsang, "A simple method for generating gamma variables", 2000.
        """
        boost = np.ones(count)
        if shape < 1.0:
            with np.errstate(over="ignore"):  # a shape next to zero: almost all draws are zero
                boost = elementary.exp(elementary.log(1.0 - self.uniform(count)) / shape)
        d = (shape + 1.0 if shape < 1.0 else shape) - 1.0 / 3.0
        c = 1.0 / math.sqrt(9.0 * d)
        drawn, left = np.empty(count), np.arange(count)
        while len(left):
            x = self.normal(len(left))
            root = 1.0 + c * x
            v = root * root * root
            u = 1.0 - self.uniform(len(left))
            bound = 0.5 * x * x + d - d * v + d * elementary.log(np.maximum(v, 1e-300))
            accepted = (v > 0.0) & (elementary.log(u) < bound)
            drawn[left[accepted]] = d * v[accepted]
            left = left[~accepted]
        return drawn * boost

    def dirichlet(self, alpha: float, count: int) -> F64:
        """float64 [count], not negative, summing to one: one draw from the symmetric Dirichlet distribution."""
        draws = self.gamma(alpha, count)
        total = math.fsum(draws.tolist())
        return draws / total if total > 0.0 else np.full(count, 1.0 / count)
