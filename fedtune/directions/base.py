"""What a family of directions is: the contract between the method and the kernels.

A family maps (pool seed, k, position) to a value z_k[p], and to nothing else: not device, dtype, chunk or thread count.
E[z z^T] = I over pool seeds, but for `axes`, which is not random. Positions come from `fedtune.layout`: element i of a
tensor is at `entry.origin + i`.

A family works on contiguous 1-D float32 numpy arrays, a run of positions p0 .. p0+m-1 at a time; `host.py` cuts
tensors of any dtype, device and layout into such runs. `cpu/` holds the kernels; `gpu/` those for CUDA, which give the
same values and are chosen by `choice.py`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedtune.errors import DirectionsError
from fedtune.layout import Layout

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
MAX_POOL = 65536  # the largest tile of family hadamard
MAX_AXES = 2**40  # parameters of a model
DISJOINT = ("axes",)  # families in which no two directions of a pool have a position in common
MAX_RANK = 256  # of family lowrank: the factors of one seed are made at once


@dataclass(frozen=True)
class Pool:
    """K candidate seeds: the family that turns them into directions, and the 64-bit seed that names the pool.

    `candidates` is used by the families `torch` and `torch-truncated` only: the literal seeds of the official codes (drawn
    from the pool seed when empty). `rank` is used by `lowrank` only.
    """

    family: str
    seed: int
    size: int
    candidates: tuple[int, ...] = field(default=(), repr=False)
    rank: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.size <= (MAX_POOL if not self.disjoint else MAX_AXES):
            raise DirectionsError(f"A pool has 1 to {MAX_POOL} seeds, not {self.size}: lower K.", size=self.size)
        if self.candidates and len(self.candidates) != self.size:
            raise DirectionsError(f"The pool has {self.size} seeds but {len(self.candidates)} candidates were given.")
        if not 1 <= self.rank <= MAX_RANK:
            raise DirectionsError(f"A direction has rank 1 to {MAX_RANK}, not {self.rank}: change rank.", rank=self.rank)

    @property
    def disjoint(self) -> bool:
        """Every position belongs to one direction at most, so that there are no sums of coefficients, which must be exact."""
        return self.family in DISJOINT

    @property
    def identity(self) -> bytes:
        """8 bytes that differ between any two different pools; goes into every message."""
        text = f"{self.family} {self.seed} {self.size} {','.join(map(str, self.candidates))}"
        text += f" rank {self.rank}" if self.family == "lowrank" else ""
        return hashlib.sha256(text.encode()).digest()[:8]


class Family(ABC):
    """The rule from seed to direction. Stateless apart from what is derived from the pool and the layout."""

    name: ClassVar[str]
    exact: ClassVar[bool]
    """Sums of grid coefficients are exact in float32 (values of +1 or -1) or there are none: equal on every device."""
    fast_combine: ClassVar[bool]
    """The cost of `combine` and `project` does not grow with K, so a replica is rebuilt rather than copied."""
    whole: ClassVar[bool] = False
    """A direction is drawn as a whole, so the pool is walked seed by seed and not tensor by tensor."""
    shaped: ClassVar[bool] = False
    """A direction depends on the shapes of the tensors: every run of a matrix, or of a stack of them, is of whole rows."""

    takes_bits: ClassVar[bool] = False
    """Where float32 arrays are said, the bits of bfloat16 numbers will do too (uint16, all of a call): rounded to nearest."""

    thin: ClassVar[bool] = False
    """The direction of a matrix is a product of thin factors, which `factors` and `vector` give (see lowrank.py)."""

    def __init__(self, pool: Pool, layout: Layout) -> None:
        self.pool, self.layout = pool, layout

    @abstractmethod
    def add(self, out: F32, base: F32, p0: int, k: int, c: float) -> None:
        """out[i] = base[i] + float32(c) * z_k[p0 + i], all in float32, one product and one sum each; out may be base."""

    @abstractmethod
    def combine(self, out: F32, base: F32, p0: int, coefficients: F32) -> None:
        """out[i] = base[i] + (sum_k coefficients[k] * z_k[p0 + i]); the sum first, in float32, then one addition.

        `coefficients` is float32 [K]. out may be base.
        """

    @abstractmethod
    def project(self, sums: F64, delta: F32, p0: int, wanted: Bools | None) -> None:
        """sums[k] += sum_i delta[i] * z_k[p0 + i] for every k that is `wanted` (bool [K]; None: all); sums is float64 [K].

        The order of summation is fixed by p0 and len(delta), never by the number of threads.
        """


def make_family(pool: Pool, layout: Layout) -> Family:
    """The family called `pool.family`.

    Raises:
        DirectionsError: no such family (the message names those there are).
    """
    from fedtune.directions.families import FAMILIES

    if pool.family not in FAMILIES:
        raise DirectionsError(f"There is no family '{pool.family}': use one of {', '.join(FAMILIES)}.", family=pool.family)
    return FAMILIES[pool.family](pool, layout)
