"""Sound messages of every kind and width to begin from, and how a server or a client would read one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from fedtune import packing, wire
from fedtune.coefficients import PoolCoefficients, quantise
from fedtune.directions.base import Pool
from fedtune.wire import Instruction, Kind, Status, Update

DIGEST, FINGERPRINT, LAYOUT = bytes(range(16)), b"f" * 16, b"l" * 16
ROUND, STEPS, MOST_POOLS = 4, 50, 60_000
HEAD = b"FT" + bytes([wire.VERSION])  # what every message begins with


@dataclass(frozen=True)
class Shape:
    """L blocks of K seeds, with so many bits a coefficient."""

    blocks: int
    size: int
    bits: int

    def pool(self, number: int) -> Pool:
        """Of the run."""
        return Pool("hadamard", number, self.size)

    def coefficients(self, number: int, share: float) -> PoolCoefficients:
        """With so large a share of numbers that are not zero."""
        random = np.random.default_rng([number, self.size, self.bits])
        values = random.standard_normal((self.blocks, self.size)) * (random.random((self.blocks, self.size)) < share)
        return quantise(self.pool(number), values, self.bits)


SHAPES = (Shape(1, 8, 4), Shape(3, 48, 8), Shape(2, 64, 24), Shape(41, 4096, 8), Shape(1, 65535, 2))


# ---------------------------------------------------------------------------------------------------- pools


@cache
def pools(shape: Shape) -> list[bytes]:
    """A pool in each of the five forms."""
    before, after = shape.coefficients(0, 0.2), shape.coefficients(0, 0.21)
    front = np.where(np.arange(shape.size) < 2, after.q, 0).astype(np.int32)
    leading = PoolCoefficients(shape.pool(0), front, np.where(front.any(axis=1), after.exponents, 0).astype(np.int32))
    found = [packing.encode_pool(shape.coefficients(0, share), shape.bits) for share in (0.0, 1.0, 2.0 / shape.size)] + [
        packing.encode_pool(leading, shape.bits),
        packing.encode_pool(after, shape.bits, before),
    ]
    change = bytes(after.exponents.astype("<i1")) + before.identity[:8]
    empty = bytes([2]) + bytes((shape.blocks * shape.size + 7) // 8)
    return [*found, shape.pool(0).identity + bytes([packing.Form.DIFFERENCE]) + change + empty]


def known(shape: Shape) -> PoolCoefficients:
    """What the reader has of pool 0: differences are from it."""
    return shape.coefficients(0, 0.2)


# ---------------------------------------------------------------------------------------------------- instructions


@cache
def instructions(shape: Shape) -> list[bytes]:
    """One pool or several, uniform, with draw weights, with counts, as a difference."""
    first, second = shape.coefficients(0, 0.2), shape.coefficients(1, 0.1)
    nothing, ones = np.zeros(0, np.uint16), np.ones(max(shape.blocks, shape.size), np.uint16)
    plain = {"round": ROUND, "fingerprint": FINGERPRINT, "layout": LAYOUT, "digest": DIGEST}
    built = [
        Instruction(**plain, held=0, pools=(first,), draw_weights=nothing),
        Instruction(**plain, held=0, pools=(shape.coefficients(0, 0.21),), draw_weights=nothing, known=first),
        Instruction(**plain, held=1, pools=(second, shape.coefficients(2, 0.0)), draw_weights=ones[: shape.size]),
        Instruction(**plain, held=0, pools=(shape.coefficients(0, 0.0),), draw_weights=nothing, counts=ones[: shape.blocks]),
    ]
    return [wire.encode_instruction(one, shape.bits) for one in built]


def read_instruction(shape: Shape, data: bytes) -> Instruction:
    """As a client does."""
    return wire.decode_instruction(
        data,
        shape.pool,
        lambda round: MOST_POOLS,
        shape.blocks,
        shape.bits,
        lambda number: None if number else known(shape),
    )


# ---------------------------------------------------------------------------------------------------- updates


@dataclass(frozen=True)
class Asked:
    """What a round asks for: `counts`: the server chose how many coordinates of each block."""

    kind: Kind
    bits: int
    counts: bool = False


ASKED = (
    *(Asked(Kind.SCALARS, bits) for bits in (32, 16, 8)),
    *(Asked(Kind.COORDINATES, bits, chosen) for bits in (32, 16, 8, 4, 2, 1) for chosen in (False, True)),
    *(Asked(Kind.WEIGHTS, bits) for bits in (32, 16)),
)
CLIENT = "site-a"
COUNTS, PARAMETERS = np.array([3, 0, 40], np.int64), 16_000


@cache
def updates(asked: Asked) -> list[bytes]:
    """A finished one, one that ended early, and (scalars) one of a single step."""
    random = np.random.default_rng(int(asked.kind))
    built = []
    for status, steps in ((Status.FINISHED, STEPS), (Status.NOT_FINITE, 7), (Status.FINISHED, 1)):
        counts = COUNTS if asked.kind == Kind.COORDINATES else np.zeros(0, np.int64)
        length = {Kind.SCALARS: steps, Kind.COORDINATES: int(COUNTS.sum())}.get(
            asked.kind, PARAMETERS if status == Status.FINISHED else 0
        )
        scalars = random.standard_normal(length).astype(np.float32)
        built.append(Update(ROUND, DIGEST, status, steps, 120, 2.5, scalars, counts, asked.kind == Kind.WEIGHTS))
    return [encode_update(update, asked) for update in built]


def encode_update(update: Update, asked: Asked) -> bytes:
    """As the client would."""
    return wire.encode_update(update, asked.bits, client=CLIENT, with_counts=not asked.counts)


def read_update(asked: Asked, data: bytes) -> Update:
    """As the server does."""
    return wire.decode_update(
        data,
        kind=asked.kind,
        round=ROUND,
        digest=DIGEST,
        client=CLIENT,
        max_steps=STEPS,
        blocks=len(COUNTS),
        max_count=48,
        bits=asked.bits,
        asked=COUNTS if asked.counts else None,
        parameters=PARAMETERS,
    )
