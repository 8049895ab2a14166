"""Byte layout of every message: encode, decode, refuse. docs/wire.md is the specification; golden bytes are in the tests.

Numbers are little-endian. A decoder checks the length against what the header promises before it allocates, reads every
byte, and raises a WireError for anything it does not expect; nothing is unpickled, nothing is executed.

  instruction (server to client)
    "FT" version kind=1 | round u32 | base fingerprint 16 | layout digest 16 | digest of the model to start from 16
    | pools held u16 | pools sent u16 | pools ... | extra u8 (0 nothing, 1 draw weights, 2 counts)
    [| K x u16 draw weights, or L x u16 counts]
  pool
    identity 8 | form u8 (0 zero, 1 dense, 2 sparse, 3 difference, 4 prefixes) [| exponents L x i8
    [| names what it differs from 8 | bits u8] [| bitmap ceil(L K / 8)] [| L x u16 lengths] | packed values]
  update (client to server)
    "FT" version kind=2|3|4 | round u32 | answer 16 | status u8 | steps u32 | examples u32 | mean training loss f32
    kind 2 (scalars):      steps x P x number
    kind 3 (coordinates):  [L x u16 counts |] sum of counts x number, or L x bfloat16 units | packed whole numbers
    kind 4 (weights):      d x number; nothing with status 1
fedtune/bits.py has the bits of a number.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt

from fedtune import packing
from fedtune.bits import UNIT_BITS, Reader, pack_blocks, packed_length, scalars_packed, unpack_blocks, unpack_scalars
from fedtune.coefficients import PoolCoefficients
from fedtune.directions.base import F32, Pool
from fedtune.errors import MalformedMessageError, MismatchError, NonFiniteError
from fedtune.packing import Known, take_pool
from fedtune.pieces import Buffer, all_finite, joined

I64 = npt.NDArray[np.int64]
U16 = npt.NDArray[np.uint16]
MAGIC, VERSION = b"FT", 4
encode_pool, decode_pool = packing.encode_pool, packing.decode_pool  # a part of the format that also stands alone
_HEAD = struct.Struct("<2sBBI")
_INSTRUCTION = struct.Struct("<16s16s16sHH")
_UPDATE = struct.Struct("<16sBIIf")
LARGEST_LOSS = 1e6
"""Nats. Logits of float16 end at 65,504, so no loss of such a model is above 131,008; one above this is of no model of use."""


class Kind(IntEnum):
    """What a message is."""

    INSTRUCTION = 1
    SCALARS = 2
    COORDINATES = 3
    WEIGHTS = 4


class Extra(IntEnum):
    """What stands at the end of an instruction."""

    NOTHING = 0
    DRAW_WEIGHTS = 1
    COUNTS = 2


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
        counts: uint16 [L], coordinates that every client sends of each block (Ferret, shared); empty if it chooses itself.
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
    counts: U16 = field(default_factory=lambda: np.zeros(0, dtype=np.uint16))
    known: PoolCoefficients | None = None


@dataclass(frozen=True, eq=False)
class Update:
    """What a client measured in a round.

    Attributes:
        round, digest: the instruction it answers.
        status: whether all steps were finite. `steps` counts the finite ones.
        examples: training samples that the client owns (the weight of its update).
        train_loss: mean over the steps, 0 .. LARGEST_LOSS.
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


# ---------------------------------------------------------------------------------------------------- messages


def encode_instruction(instruction: Instruction, bits: int) -> bytes:
    """An instruction as bytes; `bits` per coefficient."""
    return joined(instruction_packed(instruction, bits))


def instruction_packed(instruction: Instruction, bits: int) -> Iterator[bytes]:
    """`encode_instruction`, piece by piece."""
    yield _HEAD.pack(MAGIC, VERSION, Kind.INSTRUCTION, instruction.round)
    yield _INSTRUCTION.pack(
        instruction.fingerprint, instruction.layout, instruction.digest, instruction.held, len(instruction.pools)
    )
    yield from _pools(instruction, bits)
    yield _extra(instruction)


def _pools(instruction: Instruction, bits: int) -> Iterator[bytes]:
    """The pools, the first one as what changed if that is shorter; prefixes as long as the reader has room for them."""
    room = packing.PREFIX_ROOM
    for number, pool in enumerate(instruction.pools):
        form, pieces = packing.pool_packed(pool, bits, None if number else instruction.known, room)
        room -= packing.takes_room(form, pool.q.size, bits)
        yield from pieces


def _extra(instruction: Instruction) -> bytes:
    """The end of an instruction: one byte, and the draw weights or counts if it has any."""
    for what, numbers in ((Extra.DRAW_WEIGHTS, instruction.draw_weights), (Extra.COUNTS, instruction.counts)):
        if numbers.size:
            return bytes([what]) + numbers.astype("<u2").tobytes()
    return bytes([Extra.NOTHING])


def decode_instruction(
    data: Buffer,
    pool_at: Callable[[int], Pool],
    most_pools: Callable[[int], int],
    blocks: int,
    bits: int,
    known_at: Callable[[int], PoolCoefficients | None] = lambda number: None,
) -> Instruction:
    """Read an instruction. Its pools take at most PREFIX_ROOM and 32 times the message in memory (`fedtune.packing`).

    Args:
        data: the message.
        pool_at: the pool with a given number (from 0) of this run; those that the message carries must be among them.
        most_pools: of a round (from 1): pools that the run can have by then.
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
    most = most_pools(round)
    if held + sent > most or sent == 0:
        raise MismatchError(
            f"The message speaks of {held + sent} pools; in round {round} it has at most {most}, and one at least."
        )
    first: Known = partial(known_at, held)
    known = chain([first], repeat(_nothing))  # the first pool alone may be a difference
    decoded = tuple(take_pool(reader, pool_at(number), blocks, bits, next(known)) for number in range(held, held + sent))
    size = decoded[-1].pool.size
    extra = reader.take(1)[0]
    if extra not in tuple(Extra):
        raise MalformedMessageError(f"The message ends with something of kind {extra}, which does not exist.")
    weights = _take_u16(reader, size if extra == Extra.DRAW_WEIGHTS else 0)
    counts = _take_u16(reader, blocks if extra == Extra.COUNTS else 0)
    reader.finish()
    if not weights.all():
        raise MalformedMessageError("A seed has no chance of being drawn.")
    if (counts > size).any():
        raise MalformedMessageError(f"A block has {int(counts.max())} coordinates; the pool has {size} seeds.")
    return Instruction(round, fingerprint, layout, digest, held, decoded, weights, counts)


def _nothing() -> None:
    """What the reader has of a pool that is not the first."""


def named_state(data: Buffer) -> tuple[bytes, bytes]:
    """What the head of an instruction says: digest of its model, fingerprint of the base. Raises MalformedMessageError."""
    reader = Reader(data)
    _read_head(reader, Kind.INSTRUCTION)
    fingerprint, _, digest, _, _ = reader.unpack(_INSTRUCTION)
    return digest, fingerprint


def _take_u16(reader: Reader, count: int) -> U16:
    return np.frombuffer(reader.take(2 * count), dtype="<u2").astype(np.uint16)


def answer(digest: bytes, round: int, client: str) -> bytes:
    """16 bytes that only the update of `client` to the instruction of `round`, with the model `digest`, carries.

    >>> answer(bytes(range(16)), 4, "7").hex()
    '09295953fc6bfa473b5002709ff11ad7'
    """
    return hashlib.sha256(b"fedtune answer" + digest + struct.pack("<I", round) + client.encode()).digest()[:16]


def encode_update(update: Update, bits: int, *, client: str, with_counts: bool = True) -> bytes:
    """An update of `client` as bytes; `bits` per number. `counts` are left out where the server chose them."""
    named = answer(update.digest, update.round, client)
    fields = (named, update.status, update.steps, update.examples, update.train_loss)
    head = _HEAD.pack(MAGIC, VERSION, update.kind, update.round) + _UPDATE.pack(*fields)
    if update.kind != Kind.COORDINATES:
        return joined(chain([head], scalars_packed(update.scalars, bits)))
    counts = update.counts.astype("<u2").tobytes() if with_counts else b""
    return head + counts + pack_blocks(update.scalars, update.counts, bits)


def update_length(numbers: int, bits: int, *, blocks: int = 0, with_counts: bool = True) -> int:
    """Bytes of an update of so many numbers of `bits` bits: coordinates if there are `blocks`, else scalars or weights."""
    units = 2 * blocks if bits < UNIT_BITS else 0
    return _HEAD.size + _UPDATE.size + (2 * blocks if with_counts else 0) + units + packed_length(numbers, bits)


def decode_update(
    data: Buffer,
    *,
    kind: Kind,
    round: int,
    digest: bytes,
    client: str,
    max_steps: int,
    blocks: int,
    max_count: int,
    bits: int,
    per_step: int = 1,
    asked: I64 | None = None,
    parameters: int = 0,
    others: Iterable[str] = (),
) -> Update:
    """Read a client's update and refuse what the round did not ask this client for.

    Args:
        data: the message.
        kind: SCALARS, COORDINATES or WEIGHTS.
        round, digest, client: what was asked, and of whom.
        max_steps: most local steps.
        blocks: L (COORDINATES).
        max_count: most coordinates a block can have, the size of the pool (COORDINATES).
        bits: per number.
        per_step: scalars of each step (SCALARS).
        asked: int64 [L], the counts if the server chose them (COORDINATES); None: the message has them.
        parameters: d (WEIGHTS).
        others: clients that were asked the same; whose update it is instead is said by name.

    Raises:
        MalformedMessageError: wrong length, magic, version or count, or a field outside its range.
        MismatchError: another round or client, or another model than the one sent out.
        NonFiniteError: a NaN or an infinity.
    """
    reader = Reader(data)
    number = _read_head(reader, kind)
    if number != round:
        raise MismatchError(f"The update is for round {number}; this is round {round}.", got=number, expected=round)
    answered, status, steps, examples, loss = reader.unpack(_UPDATE)
    if answered != answer(digest, round, client):
        raise _not_asked(answered, digest, round, others)
    if status not in tuple(Status):
        raise MalformedMessageError(f"There is no status {status}.")
    _check_ranges(steps, max_steps, examples, loss, Status(status))
    counts = np.zeros(0, dtype=np.int64)
    if kind != Kind.COORDINATES:
        length = steps * per_step if kind == Kind.SCALARS else parameters if status == Status.FINISHED else 0
        scalars = unpack_scalars(reader.take(packed_length(length, bits)), bits)
    else:
        counts = _take_u16(reader, blocks).astype(np.int64) if asked is None else asked
        if (counts > max_count).any():
            raise MalformedMessageError(f"A block has {int(counts.max())} coordinates; the pool has {max_count} seeds.")
        scalars = unpack_blocks(reader, counts, bits)
    reader.finish()
    if not all_finite(scalars):
        raise NonFiniteError("The update contains a number that is not finite.")
    return Update(number, digest, Status(status), steps, examples, loss, scalars, counts, kind == Kind.WEIGHTS)


def _not_asked(answered: bytes, digest: bytes, round: int, others: Iterable[str]) -> MismatchError:
    """The error for an update that answers something else than what its sender was asked."""
    for other in others:
        if answered == answer(digest, round, other):
            return MismatchError(f"It is the update of client {other}: an update counts for the client that made it.")
    return MismatchError("The update starts from another model, round or client than was asked.")


def _check_ranges(steps: int, max_steps: int, examples: int, loss: float, status: Status) -> None:
    """Refuse numbers that no work of a client has."""
    if steps > max_steps or examples == 0:
        raise MalformedMessageError(f"{steps} steps on {examples} samples; at most {max_steps} steps were asked.")
    if steps == 0 and status == Status.FINISHED:
        raise MalformedMessageError("The update has no steps.")
    if not math.isfinite(loss):
        raise NonFiniteError("The update contains a number that is not finite.")
    if not 0.0 <= loss <= LARGEST_LOSS:
        raise MalformedMessageError(f"The training loss is {loss:.3g}: 0 to {LARGEST_LOSS:,.0f} nats were expected (lower lr).")


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
