"""Byte layout of every message: encode, decode, refuse. docs/wire.md is the specification; golden bytes are in the tests.

Numbers are little-endian. A decoder checks the length against what the header promises before it allocates, reads every
byte, and raises a WireError for anything it does not expect; nothing is unpickled, nothing is executed.

  instruction (server to client)
    "FT" version kind=1 | round u32 | base fingerprint 16 | layout digest 16 | digest of the model to start from 16
    | pools held u16 | pools sent u16 | pools ... | weights flag u8 [| K x u16 draw weights]
  pool
    identity 8 | form u8 (0 zero, 1 dense, 2 sparse, 3 difference) [| exponents L x i8
    [| names what it differs from 8 | bits u8] [| bitmap ceil(L K / 8)] | packed values]
  update (client to server)
    "FT" version kind=2|3|4 | round u32 | digest of the model it started from 16 | status u8 | steps u32 | examples u32
    | mean training loss f32
    kind 2 (scalars):      steps x P x scalar
    kind 3 (coordinates):  L x u16 counts | sum of counts x scalar
    kind 4 (weights):      d x scalar; nothing with status 1
A scalar is a float32, or its upper 16 bits (bfloat16, rounded to nearest even).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import numpy as np
import numpy.typing as npt

from fedtune import packing
from fedtune.coefficients import PoolCoefficients
from fedtune.directions.base import F32, Pool
from fedtune.errors import MalformedMessageError, MismatchError, NonFiniteError
from fedtune.packing import Reader, take_pool

U16 = npt.NDArray[np.uint16]
MAGIC, VERSION = b"FT", 2
encode_pool, decode_pool = packing.encode_pool, packing.decode_pool  # a part of the format that also stands alone
_HEAD = struct.Struct("<2sBBI")
_INSTRUCTION = struct.Struct("<16s16s16sHH")
_UPDATE = struct.Struct("<16sBIIf")


class Kind(IntEnum):
    """What a message is."""

    INSTRUCTION = 1
    SCALARS = 2
    COORDINATES = 3
    WEIGHTS = 4


class Status(IntEnum):
    """How a client's local steps ended."""

    FINISHED = 0
    NOT_FINITE = 1


@dataclass(frozen=True, eq=False)
class Instruction:
    """What a client needs for a round: the model to start from, relative to the pools that it already holds.

    Attributes:
        round: server round, from 1.
        fingerprint, layout: which base model, and how its parameters are ordered (16 bytes each).
        digest: of the model to start from; the client rebuilds it and compares.
        held: number of leading pools that the client is assumed to hold.
        pools: the pools after those, the last one open.
        draw_weights: uint16 [K], probabilities of the seeds as whole numbers (FedKSeed-Pro); empty for uniform.
        known: what the client is assumed to have of pools[0] from an earlier round; not sent, but the pool may be written
            as what changed since.
    """

    round: int
    fingerprint: bytes
    layout: bytes
    digest: bytes
    held: int
    pools: tuple[PoolCoefficients, ...]
    draw_weights: U16
    known: PoolCoefficients | None = None


@dataclass(frozen=True, eq=False)
class Update:
    """What a client measured in a round.

    Attributes:
        round, digest: the instruction it answers.
        status: whether all steps were finite. `steps` counts the finite ones.
        examples: training samples that the client owns (the weight of its update).
        train_loss: mean over the steps.
        scalars: float32 [steps * P] scalar gradients (FedKSeed, P in each step), or float32 [sum of counts] coordinates
            (Ferret), or float32 [d], the change of every weight in layout order (FedAvg; none if `status` is NOT_FINITE).
        counts: int64 [L], coordinates in each block (Ferret); empty for the others.
        weights: whether `scalars` are changes of weights.
    """

    round: int
    digest: bytes
    status: Status
    steps: int
    examples: int
    train_loss: float
    scalars: F32
    counts: npt.NDArray[np.int64]
    weights: bool = False

    @property
    def kind(self) -> Kind:
        """Of its message."""
        if self.weights:
            return Kind.WEIGHTS
        return Kind.COORDINATES if self.counts.size else Kind.SCALARS


# ---------------------------------------------------------------------------------------------------- scalars


def round_scalars(values: F32, bits: int) -> F32:
    """The float32 values that survive the wire at `bits` (16: bfloat16, nearest even; 32: unchanged)."""
    return unpack_scalars(pack_scalars(values, bits), bits)


def pack_scalars(values: F32, bits: int) -> bytes:
    """float32 [n] to n * bits / 8 bytes."""
    plain = np.ascontiguousarray(values, dtype="<f4")
    if bits == 32:
        return plain.tobytes()
    raw = plain.view("<u4").astype(np.uint64)
    upper = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
    return upper.astype("<u2").tobytes()


def unpack_scalars(data: bytes, bits: int) -> F32:
    """The inverse of `pack_scalars`."""
    if bits == 32:
        return np.frombuffer(data, dtype="<f4").astype(np.float32)
    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


# ---------------------------------------------------------------------------------------------------- messages


def encode_instruction(instruction: Instruction, bits: int) -> bytes:
    """An instruction as bytes; `bits` per coefficient."""
    parts = [
        _HEAD.pack(MAGIC, VERSION, Kind.INSTRUCTION, instruction.round),
        _INSTRUCTION.pack(
            instruction.fingerprint, instruction.layout, instruction.digest, instruction.held, len(instruction.pools)
        ),
        *(encode_pool(pool, bits, None if number else instruction.known) for number, pool in enumerate(instruction.pools)),
        bytes([1 if instruction.draw_weights.size else 0]),
        instruction.draw_weights.astype("<u2").tobytes(),
    ]
    return b"".join(parts)


def decode_instruction(
    data: bytes,
    pool_at: Callable[[int], Pool],
    most_pools: int,
    blocks: int,
    bits: int,
    known_at: Callable[[int], PoolCoefficients | None] = lambda number: None,
) -> Instruction:
    """Read an instruction.

    Args:
        data: the message.
        pool_at: the pool with a given number (from 0) of this run; those that the message carries must be among them.
        most_pools: pools that the whole run can have.
        blocks: L of the client's layout.
        bits: per coefficient.
        known_at: what the reader has of the pool with a given number, if anything; asked if the message is a difference.

    Raises:
        MalformedMessageError, MismatchError: see `fedtune.errors`.
        StaleReplicaError: the message is a difference from something else than what the reader has.
    """
    reader = Reader(data)
    round = _read_head(reader, Kind.INSTRUCTION)
    fingerprint, layout, digest, held, sent = reader.unpack(_INSTRUCTION)
    if held + sent > most_pools or sent == 0:
        raise MismatchError(f"The message speaks of {held + sent} pools; this run has at most {most_pools}.")
    decoded = tuple(
        take_pool(reader, pool_at(number), blocks, bits, partial(known_at, number)) for number in range(held, held + sent)
    )
    size = decoded[-1].pool.size
    flag = reader.take(1)[0]
    if flag > 1:
        raise MalformedMessageError(f"The weights flag is {flag}, not 0 or 1.")
    weights = np.frombuffer(reader.take(2 * size * flag), dtype="<u2").astype(np.uint16)
    reader.finish()
    if flag and not weights.all():
        raise MalformedMessageError("A seed has no chance of being drawn.")
    return Instruction(round, fingerprint, layout, digest, held, decoded, weights)


def encode_update(update: Update, bits: int) -> bytes:
    """An update as bytes; `bits` per scalar."""
    fields = (update.digest, update.status, update.steps, update.examples, update.train_loss)
    return b"".join(
        [
            _HEAD.pack(MAGIC, VERSION, update.kind, update.round),
            _UPDATE.pack(*fields),
            update.counts.astype("<u2").tobytes(),
            pack_scalars(update.scalars, bits),
        ]
    )


def decode_update(
    data: bytes,
    *,
    kind: Kind,
    round: int,
    digest: bytes,
    max_steps: int,
    blocks: int,
    max_count: int,
    bits: int,
    per_step: int = 1,
    parameters: int = 0,
) -> Update:
    """Read a client's update and refuse what the round did not ask for.

    Args:
        data: the message.
        kind: SCALARS, COORDINATES or WEIGHTS.
        round, digest: what was asked.
        max_steps: most local steps.
        blocks: L (COORDINATES).
        max_count: most coordinates a block can have, the size of the pool (COORDINATES).
        bits: per scalar.
        per_step: scalars of each step (SCALARS).
        parameters: d (WEIGHTS).

    Raises:
        MalformedMessageError: wrong length, magic, version or count.
        MismatchError: another round, or another model than the one sent out.
        NonFiniteError: a NaN or an infinity.
    """
    reader = Reader(data)
    number = _read_head(reader, kind)
    if number != round:
        raise MismatchError(f"The update is for round {number}; this is round {round}.", got=number, expected=round)
    started, status, steps, examples, loss = reader.unpack(_UPDATE)
    if started != digest:
        raise MismatchError("The update starts from another model than the one that was sent.")
    if status not in tuple(Status):
        raise MalformedMessageError(f"There is no status {status}.")
    if steps > max_steps or examples == 0:
        raise MalformedMessageError(f"{steps} steps on {examples} samples; at most {max_steps} steps were asked.")
    counts = np.zeros(0, dtype=np.int64)
    length = steps * per_step
    if kind == Kind.COORDINATES:
        counts = np.frombuffer(reader.take(2 * blocks), dtype="<u2").astype(np.int64)
        if (counts > max_count).any():
            raise MalformedMessageError(f"A block has {int(counts.max())} coordinates; the pool has {max_count} seeds.")
        length = int(counts.sum())
    elif kind == Kind.WEIGHTS:
        length = parameters if status == Status.FINISHED else 0
    scalars = unpack_scalars(reader.take(length * bits // 8), bits)
    reader.finish()
    if not (np.isfinite(scalars).all() and np.isfinite(loss)):
        raise NonFiniteError("The update contains a number that is not finite.")
    return Update(number, digest, Status(status), steps, examples, loss, scalars, counts, kind == Kind.WEIGHTS)


def _read_head(reader: Reader, kind: Kind) -> int:
    magic, version, got, number = reader.unpack(_HEAD)
    if magic != MAGIC:
        raise MalformedMessageError("This is not a fedtune message.")
    if version != VERSION:
        raise MalformedMessageError(
            f"The message has format {version}, this program reads {VERSION}: install the same fedtune on both sides."
        )
    if got != kind:
        raise MalformedMessageError(f"The message is of kind {got}; {int(kind)} was expected.")
    return int(number)
