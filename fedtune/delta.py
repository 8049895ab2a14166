"""A tuned model as a file of kilobytes: base fingerprint plus coefficients, in safetensors. docs/delta.md is the specification.

The file has three tensors, `lengths` and `exponents` [pools, L] and the packed coefficients `q`, and says everything else in
its metadata. The same model gives the same bytes. `delta_reader.py` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt

import fedtune
from fedtune.bits import Whole, integers_packed, narrowest, packed_length
from fedtune.coefficients import Coefficients, PoolCoefficients
from fedtune.directions.base import Pool
from fedtune.errors import MalformedDeltaError
from fedtune.layout import BlockRule
from fedtune.packing import prefixes
from fedtune.pieces import AT_ONCE, joined, pieces

FORMAT, VERSION = "fedtune-delta", 2
FEWEST_BITS, MOST_BITS = 2, 32  # of a coefficient
MOST_COEFFICIENTS = 1 << 29  # of all pools, with those that are zero
SPREAD = 1 << 27  # bytes that coefficients may take in memory besides 32 times those that they have in the file


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
    """The one file of `delta`.

    Raises:
        MalformedDeltaError: its pools differ in family, rank or K or have literal seeds, or are larger than a reader takes.
    """
    odd = [c.pool for c in delta.pools if c.pool != Pool(delta.family, c.pool.seed, delta.size, rank=delta.rank)]
    if odd:
        raise MalformedDeltaError(f"A delta has pools of one family, rank and K without literal seeds; {odd[0]} differs.")
    largest = max((int(np.abs(piece).max()) for row in _rows(delta) for piece in pieces(row)), default=0)
    bits = max(FEWEST_BITS, largest.bit_length() + 1)
    lengths = np.array([prefixes(pool.q) for pool in delta.pools], np.int64).reshape(len(delta.pools), len(delta.block_sizes))
    if too_large(lengths, delta.size, bits):
        raise MalformedDeltaError(
            f"{len(delta.pools)} pools of {len(delta.block_sizes)} blocks and {delta.size} seeds are more than a delta holds: "
            "export the weights (--format hf)."
        )
    tensors = declared(lengths, delta.size, bits)
    header = {"__metadata__": _metadata(delta, bits), **tensors}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    exponents = np.array([pool.exponents for pool in delta.pools], "<i1")
    used = (piece for row, length in zip(_rows(delta), lengths.reshape(-1), strict=True) for piece in pieces(row[:length]))
    start = [len(text).to_bytes(8, "little"), text, lengths.astype(length_type(delta.size)).tobytes(), exponents.tobytes()]
    return joined(chain(start, _in_order(used, bits)))


def _rows(delta: Delta) -> Iterator[Whole]:
    """The coefficients [K] of each block of each pool."""
    return (row for pool in delta.pools for row in pool.q)


def _in_order(parts: Iterator[Whole], bits: int) -> Iterator[bytes]:
    """Whole numbers of many arrays [n], packed one after the other without a gap."""
    rest: list[Whole] = []
    waiting = 0
    for part in parts:
        rest.append(part)
        waiting += len(part)
        if waiting >= AT_ONCE:
            together = np.concatenate(rest)
            whole = waiting - waiting % 8  # numbers whose bits end with a byte
            yield from integers_packed(together[:whole], bits)
            rest, waiting = [together[whole:]], waiting - whole
    if waiting:
        yield from integers_packed(np.concatenate(rest), bits)


def too_large(lengths: npt.NDArray[np.int64], size: int, bits: int) -> bool:
    """Whether coefficients with these `lengths` [pools, L] of `size` seeds are more than a reader gives memory to."""
    coefficients = lengths.size * size
    memory = coefficients * np.dtype(narrowest(bits)).itemsize
    return coefficients > MOST_COEFFICIENTS or memory > SPREAD + 32 * packed_length(int(lengths.sum()), bits)


def length_type(size: int) -> str:
    """The numpy type of `lengths`: 32 bits, and 64 where a pool of so many seeds needs them."""
    return "<u4" if size < 2**32 else "<u8"


def declared(lengths: npt.NDArray[np.int64], size: int, bits: int) -> dict[str, dict[str, object]]:
    """What the header says about the tensors: `lengths` and `exponents` [pools, L], then the bytes of `q`."""
    width = np.dtype(length_type(size)).itemsize
    first = lengths.size * width
    second, third = first + lengths.size, first + lengths.size + packed_length(int(lengths.sum()), bits)
    shape = list(lengths.shape)
    return {
        "lengths": {"dtype": f"U{8 * width}", "shape": shape, "data_offsets": [0, first]},
        "exponents": {"dtype": "I8", "shape": shape, "data_offsets": [first, second]},
        "q": {"dtype": "U8", "shape": [third - second], "data_offsets": [second, third]},
    }


def _metadata(delta: Delta, bits: int) -> dict[str, str]:
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
        "bits": str(bits),
        "pool_every": str(delta.pool_every),
        "pools": ",".join(f"{number}:{pool.pool.seed}" for number, pool in named),
        "round": str(delta.round),
        "digest": delta.digest.hex(),
    }
