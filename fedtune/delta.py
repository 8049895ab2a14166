"""A tuned model as a file of kilobytes: base fingerprint plus coefficients, in safetensors. docs/delta.md is the specification.

The file has two tensors, `q` [pools, L, K] and `exponents` [pools, L], and says everything else in its metadata. The same
model gives the same bytes. `delta_reader.py` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

import fedtune
from fedtune.coefficients import Coefficients, PoolCoefficients
from fedtune.directions.base import Pool
from fedtune.errors import MalformedDeltaError
from fedtune.layout import BlockRule

FORMAT, VERSION = "fedtune-delta", 1
WIDTHS: dict[str, tuple[npt.DTypeLike, int]] = {"I8": ("<i1", 127), "I16": ("<i2", 2**15 - 1), "I32": ("<i4", 2**31 - 1)}
"""Types of `q` by their name in safetensors, narrowest first: the numpy type, and the largest |q| that it is used for."""


@dataclass(frozen=True, eq=False)
class Delta:
    """What a tuned model is besides its base, and which base that is.

    Attributes:
        base: hub name or folder name of the base model, for people; `fingerprint` is what counts.
        dtype: of the base weights when they were fingerprinted.
        fingerprint, tensors, layout: 16 bytes each: of the base model, of the names and shapes of its trainable
            parameters, and of their order and blocks (see `fedtune.layout`).
        block_rule, block_sizes: how parameters share coefficients, and how many parameters each block has.
        digest: 16 bytes that name the model.
        round: server rounds that led to it.
        pool_every: rounds after which the run drew a fresh pool; 0: never.
        family, rank, size: of every pool.
        numbers: which pools of the run they are, ascending; pools without a coefficient are left out.
        pools: their coefficients, in the order in which they are added.
        program: version of fedtune that wrote it.
    """

    base: str
    dtype: str
    fingerprint: bytes
    tensors: bytes
    layout: bytes
    block_rule: BlockRule
    block_sizes: tuple[int, ...]
    digest: bytes
    round: int
    pool_every: int
    family: str
    rank: int
    size: int
    numbers: tuple[int, ...]
    pools: tuple[PoolCoefficients, ...]
    program: str = fedtune.__version__

    @cached_property
    def coefficients(self) -> Coefficients:
        """The pools as a replica takes them."""
        return Coefficients(self.pools)

    def rounds_of(self, number: int) -> tuple[int, int]:
        """First and last round in which pool `number` was added to."""
        if not self.pool_every:
            return 1, self.round
        return number * self.pool_every + 1, min((number + 1) * self.pool_every, self.round)


def encode(delta: Delta) -> bytes:
    """The one file of `delta`. Raises MalformedDeltaError if its pools differ in family, rank or K or have literal seeds."""
    odd = [c.pool for c in delta.pools if c.pool != Pool(delta.family, c.pool.seed, delta.size, rank=delta.rank)]
    if odd:
        raise MalformedDeltaError(f"A delta has pools of one family, rank and K without literal seeds; {odd[0]} differs.")
    most = max((int(np.abs(pool.q).max(initial=0)) for pool in delta.pools), default=0)
    code = next(name for name, (_, limit) in WIDTHS.items() if most <= limit)
    q = b"".join(np.ascontiguousarray(pool.q, dtype=WIDTHS[code][0]).tobytes() for pool in delta.pools)
    exponents = b"".join(np.ascontiguousarray(pool.exponents, dtype="<i1").tobytes() for pool in delta.pools)
    header = {"__metadata__": _metadata(delta), **declared(code, (len(delta.pools), len(delta.block_sizes), delta.size))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, q, exponents])


def declared(code: str, shape: Sequence[int]) -> dict[str, dict[str, object]]:
    """What the header says about the tensors: `q` of type `code` and [pools, L, K], then `exponents` [pools, L]."""
    outer = shape[0] * shape[1]
    middle = outer * shape[2] * np.dtype(WIDTHS[code][0]).itemsize
    return {
        "q": {"dtype": code, "shape": list(shape), "data_offsets": [0, middle]},
        "exponents": {"dtype": "I8", "shape": list(shape[:2]), "data_offsets": [middle, middle + outer]},
    }


def _metadata(delta: Delta) -> dict[str, str]:
    """The metadata in the order of the specification; safetensors has text only."""
    named = zip(delta.numbers, delta.pools, strict=True)
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "fedtune": delta.program,
        "base": delta.base,
        "dtype": delta.dtype,
        "fingerprint": delta.fingerprint.hex(),
        "tensors": delta.tensors.hex(),
        "layout": delta.layout.hex(),
        "block_rule": delta.block_rule,
        "block_sizes": ",".join(map(str, delta.block_sizes)),
        "family": delta.family,
        "rank": str(delta.rank),
        "K": str(delta.size),
        "pool_every": str(delta.pool_every),
        "pools": ",".join(f"{number}:{pool.pool.seed}" for number, pool in named),
        "round": str(delta.round),
        "digest": delta.digest.hex(),
    }
