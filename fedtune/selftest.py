"""Whether two machines get the same directions: a few of them on fixed inputs, compared before the first round.

A client sends what `self_test` gives on its device; the server compares it with its own, so that a client whose kernels,
libraries or pool differ is refused in its first message. What is compared:

random words   Philox words and whole numbers drawn from them: equal, in every family
add, combine   of the run's first pool, on float32 and bfloat16. Families with directions of +-1 (hadamard, rademacher): equal,
               bit by bit, on every device. The others round in device and library: SAMPLES values each, within TOLERANCE
               of their size

The layout is fixed and small (vectors, a matrix of more than a tile, a stack), so the test takes milliseconds, whatever
the model. docs/wire.md has its bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

import fedtune
from fedtune.directions import Directions, Pool
from fedtune.directions.base import F32
from fedtune.errors import MalformedMessageError
from fedtune.layout import Layout
from fedtune.seeds import Stream

SHAPES = (("vector", (130,)), ("matrix", (70, 65)), ("stack", (2, 4, 6)), ("small", (3, 5)))
SEEDS = 64  # seeds with a coefficient in `combine`, spread over the pool
SAMPLES = 16  # values of each operation that are compared where rounding may differ
PARTS = ("random words", "add on float32", "add on bfloat16", "combine on float32", "combine on bfloat16")
TOLERANCE = {torch.float32: 2.0**-10, torch.bfloat16: 2.0**-6}
"""Times 1 + |value|. A normal number may be off by 3e-4 (`directions/cpu/gaussian.py`), and a bfloat16 by a unit in the
last place, 2^-8 of the value, twice; another direction is off by about 1."""

_HEAD = struct.Struct("<2sB8sB")
MAGIC, VERSION = b"FS", 1
LONGEST_PROGRAM = 64
_DIGEST = 8


@dataclass(frozen=True)
class SelfTest:
    """What a machine found.

    Attributes:
        program: version of fedtune.
        pool: identity of the pool.
        digests: 8 bytes for each of PARTS; all but the first are zero where values are compared within rounding.
        samples: float32 values, SAMPLES for each part but the first, in order; none where digests are compared.
    """

    program: str
    pool: bytes
    digests: tuple[bytes, ...]
    samples: tuple[float, ...]


@lru_cache(maxsize=4)
def self_test(pool: Pool, device: str = "cpu") -> SelfTest:
    """Run the test for `pool` on `device`. Raises DirectionsError if there are no such kernels."""
    layout = Layout.from_shapes(SHAPES, "tensor")
    directions = Directions(layout, replace(pool, size=layout.numel) if pool.disjoint else pool)
    results = [
        operation(directions, _inputs(layout, torch.device(device), dtype))
        for operation in (_added, _combined)
        for dtype in TOLERANCE
    ]
    digests = [_digest([_words(pool)])]
    if directions.family.exact:
        return SelfTest(fedtune.__version__, pool.identity, (*digests, *map(_digest, results)), ())
    samples = tuple(float(value) for result in results for value in _sampled(result))
    return SelfTest(fedtune.__version__, pool.identity, (*digests, *(bytes(_DIGEST) for _ in results)), samples)


def differences(ours: SelfTest, theirs: SelfTest) -> list[str]:
    """The parts, by name, in which another machine's test of the same pool differs from ours; [] if none does."""
    parts = [part for part, one, other in zip(PARTS, ours.digests, theirs.digests, strict=True) if one != other]
    if len(ours.samples) != len(theirs.samples):
        return [*parts, "the number of samples"]
    bounds = np.repeat([*TOLERANCE.values()] * 2, SAMPLES)[: len(ours.samples)]
    one, other = np.array(ours.samples), np.array(theirs.samples)
    apart = ~(np.abs(one - other) <= bounds * (1.0 + np.abs(one)))
    return parts + [PARTS[1 + index] for index in sorted(set((np.flatnonzero(apart) // SAMPLES).tolist()))]


def encode(test: SelfTest) -> bytes:
    """The test as bytes."""
    program = test.program.encode()
    head = _HEAD.pack(MAGIC, VERSION, test.pool, len(program))
    return b"".join([head, program, *test.digests, np.array(test.samples, dtype="<f4").tobytes()])


def decode(data: bytes) -> SelfTest:
    """The inverse of `encode`. Raises MalformedMessageError."""
    if len(data) < _HEAD.size:
        raise MalformedMessageError(f"The self-test has {len(data)} bytes; its head alone has {_HEAD.size}.")
    magic, version, pool, length = _HEAD.unpack(data[: _HEAD.size])
    if magic != MAGIC or version != VERSION:
        raise MalformedMessageError(f"This is not a self-test of format {VERSION}: install the same fedtune on both sides.")
    if length > LONGEST_PROGRAM:
        raise MalformedMessageError(f"The self-test names a version of {length} bytes; {LONGEST_PROGRAM} it has at most.")
    start = _HEAD.size + length
    end = start + _DIGEST * len(PARTS)
    sampled = 4 * SAMPLES * (len(PARTS) - 1)
    if len(data) not in (end, end + sampled):
        raise MalformedMessageError(f"A self-test of {len(data)} bytes was announced to have {end} or {end + sampled}.")
    program = data[_HEAD.size : start]
    if not program.isascii() or not program.decode("ascii").isprintable():
        raise MalformedMessageError("The self-test names no version of fedtune.")
    digests = tuple(data[at : at + _DIGEST] for at in range(start, end, _DIGEST))
    return SelfTest(program.decode("ascii"), pool, digests, tuple(np.frombuffer(data[end:], dtype="<f4").tolist()))


# ---------------------------------------------------------------------------------------------------- what is computed


def _words(pool: Pool) -> npt.NDArray[np.int64]:
    stream = Stream(pool.seed, "self-test words")
    return np.concatenate([stream.words(64).astype(np.int64), stream.below(pool.size, 64), stream.permutation(64)])


def _inputs(layout: Layout, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same numbers in (-1, 1) on every machine."""
    tensors = []
    for entry in layout.entries:
        words = Stream("self-test inputs", entry.name).words(entry.numel).astype(np.float64)
        values = ((words - 2.0**31) * 2.0**-31).astype(np.float32)
        tensors.append(torch.from_numpy(values).reshape(entry.shape).to(dtype).to(device))
    return tensors


def _added(directions: Directions, weights: list[torch.Tensor]) -> list[F32]:
    """Three directions, one after another."""
    size = directions.pool.size
    for k, c in ((0, 0.3), (size // 2, -0.7), (size - 1, 0.011)):
        directions.add(weights, k, c)
    return _on_host(weights)


def _combined(directions: Directions, weights: list[torch.Tensor]) -> list[F32]:
    """SEEDS coefficients on a grid of its own for each block."""
    layout, size = directions.layout, directions.pool.size
    chosen = np.unique(np.linspace(0, size - 1, SEEDS).astype(np.int64))
    q = Stream("self-test coefficients").below(255, layout.blocks * len(chosen)).reshape(layout.blocks, -1) - 127
    coefficients = np.zeros((layout.blocks, size), dtype=np.float32)
    coefficients[:, chosen] = np.ldexp(q.astype(np.float32), -10 - np.arange(layout.blocks)[:, None])
    directions.combine(weights, weights, coefficients)
    return _on_host(weights)


def _on_host(tensors: Iterable[torch.Tensor]) -> list[F32]:
    return [tensor.to(device="cpu", dtype=torch.float32).numpy().reshape(-1) for tensor in tensors]


def _digest(arrays: Sequence[npt.NDArray[np.generic]]) -> bytes:
    state = hashlib.sha256()
    for array in arrays:
        state.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
    return state.digest()[:_DIGEST]


def _sampled(arrays: Sequence[F32]) -> F32:
    """float32 [SAMPLES], spread over all tensors."""
    joined = np.concatenate(arrays)
    return joined[np.linspace(0, len(joined) - 1, SAMPLES).astype(np.int64)]
