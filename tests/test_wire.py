"""The wire format: golden bytes, round trips, and a growing list of hostile messages that must be refused by name."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import packing, wire
from fedtune.coefficients import PoolCoefficients, quantise
from fedtune.directions.base import Pool
from fedtune.errors import MalformedMessageError, MismatchError, NonFiniteError, StaleReplicaError, WireError
from fedtune.wire import Instruction, Kind, Status, Update

POOLS = [Pool("hadamard", number, 8) for number in range(3)]
DIGEST, FINGERPRINT, LAYOUT = bytes(range(16)), b"f" * 16, b"l" * 16
CLIENT, ANSWER = "7", "09295953fc6bfa473b5002709ff11ad7"  # the client's to DIGEST in round 4


def coefficients(number: int = 0, values: list[int] | None = None) -> PoolCoefficients:
    q = np.array(values or [1, -3, 0, 7, 0, 0, -7, 2], dtype=np.int32).reshape(1, 8)
    return PoolCoefficients(POOLS[number], q, np.array([-20 if q.any() else 0], dtype=np.int32))


def instruction(**changes: object) -> Instruction:
    plain = Instruction(1, FINGERPRINT, LAYOUT, DIGEST, 0, (coefficients(),), np.zeros(0, np.uint16))
    return replace(plain, **changes)


def scalars(**changes: object) -> Update:
    values = np.array([1.0, -2.5, 0.0], dtype=np.float32)
    return replace(Update(4, DIGEST, Status.FINISHED, 3, 120, 2.5, values, np.zeros(0, np.int64)), **changes)


def coordinates(**changes: object) -> Update:
    values = np.array([0.5, -0.25, 8.0], dtype=np.float32)
    return replace(Update(4, DIGEST, Status.FINISHED, 20, 120, 2.5, values, np.array([1, 0, 2])), **changes)


def weights(**changes: object) -> Update:
    """Of a model of three parameters."""
    return scalars(weights=True, **changes)


def read_instruction(data: bytes, bits: int = 4) -> Instruction:
    return wire.decode_instruction(data, POOLS.__getitem__, lambda round: len(POOLS), 1, bits)


def encode(update: Update, bits: int, with_counts: bool = True) -> bytes:
    """The update of CLIENT."""
    return wire.encode_update(update, bits, client=CLIENT, with_counts=with_counts)


def read_update(data: bytes, kind: Kind = Kind.SCALARS, bits: int = 32, **changes: object) -> Update:
    asked = {"round": 4, "digest": DIGEST, "client": CLIENT, "max_steps": 50, "blocks": 3, "max_count": 8, "parameters": 3}
    asked |= changes
    return wire.decode_update(data, kind=kind, bits=bits, **asked)


def test_golden_bytes_of_an_instruction() -> None:
    expected = (
        "4654040101000000" + FINGERPRINT.hex() + LAYOUT.hex() + DIGEST.hex() + "00000100"
        + POOLS[0].identity.hex() + "01" + "ec" + "59f888a1" + "00"
    )  # fmt: skip
    assert wire.encode_instruction(instruction(), 4).hex() == expected


def test_golden_bytes_of_updates() -> None:
    head = "46540402" + "04000000" + ANSWER + "00" + "03000000" + "78000000" + "00002040"
    assert encode(scalars(), 32).hex() == head + "0000803f" + "000020c0" + "00000000"
    assert encode(scalars(), 16).hex() == head + "803f" + "20c0" + "0000"
    head = "46540403" + "04000000" + ANSWER + "00" + "14000000" + "78000000" + "00002040"
    assert encode(coordinates(), 16).hex() == head + "010000000200" + "003f" + "80be" + "0041"
    units = "933d" + "0000" + "933f"  # 0.5 / 7 and 8 / 7, rounded up to bfloat16
    assert encode(coordinates(), 4).hex() == head + "010000000200" + units + "8f" + "0f"
    assert encode(coordinates(), 4, with_counts=False).hex() == head + units + "8f" + "0f"


def test_an_answer_known_by_heart() -> None:
    """SHA-256 of "fedtune answer", the digest, the round (u32) and the client's id, first 16 bytes."""
    assert wire.answer(DIGEST, 4, CLIENT).hex() == ANSWER
    others = {wire.answer(*change) for change in ((DIGEST, 5, CLIENT), (DIGEST, 4, "70"), (bytes(16), 4, CLIENT))}
    assert len({*others, bytes.fromhex(ANSWER)}) == 4


def test_whose_update_it_is_instead_is_said_by_name() -> None:
    data = encode(scalars(), 32)
    with pytest.raises(MismatchError, match="It is the update of client 7: an update counts"):
        read_update(data, client="8", others=("6", "7"))
    with pytest.raises(MismatchError, match="starts from another model, round or client"):
        read_update(data, client="8", others=("6",))


def test_golden_bytes_of_eight_bit_scalars() -> None:
    head = "46540402" + "04000000" + ANSWER + "00" + "03000000" + "78000000" + "00002040"
    assert encode(scalars(), 8).hex() == head + "3c" + "c1" + "00"


def test_golden_bytes_of_an_instruction_with_counts() -> None:
    end = "02" + "0500"
    assert wire.encode_instruction(instruction(counts=np.array([5], dtype=np.uint16)), 4).hex().endswith("59f888a1" + end)


def test_golden_bytes_of_prefixes() -> None:
    pool = Pool("hadamard", 0, 64)
    q = np.zeros((2, 64), dtype=np.int32)
    q[0, :3], q[1, 0] = [1, -3, 7], -7
    data = packing.encode_pool(PoolCoefficients(pool, q, np.array([-20, -4], dtype=np.int32)), 4)
    assert data.hex() == pool.identity.hex() + "04" + "ecfc" + "0300" + "0100" + "59" + "1f"
    assert packing.decode_pool(data, pool, 2, 4).q.tolist() == q.tolist()
    hostile = data[:11] + bytes([65, 0]) + data[13:]
    with pytest.raises(MalformedMessageError, match="A block has 65 coefficients; the pool has 64 seeds"):
        packing.decode_pool(hostile, pool, 2, 4)
    with pytest.raises(MalformedMessageError, match="announced"):
        packing.decode_pool(data[:-1], pool, 2, 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8, 16]))
def test_every_form_of_a_pool_survives(seed: int, bits: int) -> None:
    random = np.random.default_rng(seed)
    pool, limit = Pool("hadamard", 0, 48), 2 ** (bits - 1) - 1
    q = random.integers(-limit, limit + 1, size=(3, 48)).astype(np.int32)
    q[np.arange(48) >= random.integers(0, 49, size=3)[:, None]] = 0
    q[random.random((3, 48)) < random.random()] = 0
    sent = PoolCoefficients(pool, q, np.where(q.any(axis=1), -24, 0).astype(np.int32))
    assert packing.decode_pool(packing.encode_pool(sent, bits), pool, 3, bits).identity == sent.identity


def test_golden_bytes_of_an_update_of_weights() -> None:
    head = "46540404" + "04000000" + ANSWER
    tail = "03000000" + "78000000" + "00002040"
    assert encode(weights(), 32).hex() == head + "00" + tail + "0000803f" + "000020c0" + "00000000"
    assert encode(weights(), 16).hex() == head + "00" + tail + "803f" + "20c0" + "0000"
    ended = weights(status=Status.NOT_FINITE, scalars=np.zeros(0, np.float32))
    assert encode(ended, 32).hex() == head + "01" + tail
    assert read_update(encode(ended, 32), Kind.WEIGHTS).status == Status.NOT_FINITE


def test_golden_bytes_of_a_pool_of_axes() -> None:
    """32 bits a weight: whole numbers plus 2^31, lowest byte first."""
    pool = Pool("axes", 0, 3)
    full = PoolCoefficients(pool, np.array([[1, -3, 2**31 - 1]], np.int32), np.array([-40], np.int32))
    written = packing.encode_pool(full, 32)
    assert written.hex() == "726042168fc0cdbd" + "01" + "d8" + "01000080" + "fdffff7f" + "ffffffff"
    assert packing.decode_pool(written, pool, 1, 32).q.tolist() == full.q.tolist()


def test_golden_identity_of_a_pool() -> None:
    assert POOLS[0].identity.hex() == "8debccaa7999f93e"


@pytest.mark.parametrize("bits", [4, 8, 13, 24])
def test_an_instruction_survives_the_wire(bits: int) -> None:
    weights = np.arange(1, 9, dtype=np.uint16)
    sent = instruction(held=1, pools=(coefficients(1), coefficients(2, [0] * 8)), draw_weights=weights)
    got = read_instruction(wire.encode_instruction(sent, bits), bits)
    assert (got.round, got.fingerprint, got.layout, got.digest, got.held) == (1, FINGERPRINT, LAYOUT, DIGEST, 1)
    assert [pool.identity for pool in got.pools] == [pool.identity for pool in sent.pools]
    assert got.draw_weights.tolist() == weights.tolist()


@pytest.mark.parametrize("exponent", [-120, 100])
def test_exponents_at_the_ends_of_their_range_survive(exponent: int) -> None:
    sent = replace(coefficients(), exponents=np.array([exponent], np.int32))
    data = packing.encode_pool(sent, 4)
    assert packing.decode_pool(data, POOLS[0], 1, 4).identity == sent.identity
    beyond = data[:9] + struct.pack("<b", exponent + (1 if exponent > 0 else -1)) + data[10:]
    with pytest.raises(MalformedMessageError, match="exponent is outside"):
        packing.decode_pool(beyond, POOLS[0], 1, 4)


def test_a_prefix_may_be_a_whole_block() -> None:
    """No writer chooses it, since dense is shorter; every reader takes it."""
    dense = packing.encode_pool(coefficients(), 4)
    data = dense[:8] + b"\x04" + dense[9:10] + b"\x08\x00" + dense[10:]
    assert packing.decode_pool(data, POOLS[0], 1, 4).identity == coefficients().identity


def test_the_shorter_form_is_chosen() -> None:
    pool = Pool("hadamard", 0, 1024)
    few = np.zeros((1, 1024), dtype=np.int32)
    few[0, 5::100] = 5
    exponents = np.array([-3], dtype=np.int32)
    sparse = packing.encode_pool(PoolCoefficients(pool, few, exponents), 8)
    dense = packing.encode_pool(PoolCoefficients(pool, few + 1, exponents), 8)
    assert (len(sparse), len(dense)) == (8 + 1 + 1 + 128 + 11, 8 + 1 + 1 + 1024)
    assert packing.decode_pool(sparse, pool, 1, 8).q.tolist() == few.tolist()


def test_counts_that_the_server_chose_are_not_sent() -> None:
    data = encode(coordinates(), 16, with_counts=False)
    got = read_update(data, Kind.COORDINATES, 16, asked=np.array([1, 0, 2]))
    assert (got.counts.tolist(), got.scalars.tolist()) == ([1, 0, 2], [0.5, -0.25, 8.0])
    with pytest.raises(MalformedMessageError, match="announced"):
        read_update(data, Kind.COORDINATES, 16, asked=np.array([1, 1, 2]))


@pytest.mark.parametrize(
    ("unit", "error", "text"),
    [
        ("c07f", NonFiniteError, "not finite"),
        ("807f", NonFiniteError, "not finite"),
        ("80bf", MalformedMessageError, "A block's unit is negative"),
    ],
)
def test_a_unit_that_is_not_finite_or_negative_is_refused(unit: str, error: type[Exception], text: str) -> None:
    data = bytearray(encode(coordinates(), 4, with_counts=False))
    data[37:39] = bytes.fromhex(unit)
    with pytest.raises(error, match=text):
        read_update(bytes(data), Kind.COORDINATES, 4, asked=np.array([1, 0, 2]))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32])
def test_lengths_are_known_beforehand(bits: int) -> None:
    for with_counts in (True, False):
        data = encode(coordinates(), bits, with_counts=with_counts)
        assert wire.update_length(3, bits, blocks=3, with_counts=with_counts) == len(data)
    if bits > 4:
        assert wire.update_length(3, bits) == len(encode(scalars(), bits))


@pytest.mark.parametrize("bits", [16, 32])
def test_updates_survive_the_wire(bits: int) -> None:
    got = read_update(encode(scalars(), bits), bits=bits)
    assert got.scalars.tolist() == [1.0, -2.5, 0.0]
    assert (got.steps, got.examples, got.train_loss, got.status) == (3, 120, 2.5, Status.FINISHED)
    got = read_update(encode(weights(), bits), Kind.WEIGHTS, bits)
    assert (got.scalars.tolist(), got.weights) == ([1.0, -2.5, 0.0], True)
    got = read_update(encode(coordinates(), bits), Kind.COORDINATES, bits)
    assert (got.counts.tolist(), got.scalars.tolist()) == ([1, 0, 2], [0.5, -0.25, 8.0])


def test_a_step_of_several_directions_has_as_many_scalars() -> None:
    two = scalars(steps=2, scalars=np.array([1.0, -2.5, 0.0, 4.0], dtype=np.float32))
    got = read_update(encode(two, 16), bits=16, per_step=2)
    assert (got.steps, got.scalars.tolist()) == (2, [1.0, -2.5, 0.0, 4.0])
    with pytest.raises(MalformedMessageError, match="has 45 bytes; 41 were announced"):
        read_update(encode(two, 16), bits=16)
    with pytest.raises(MalformedMessageError, match="ends after 39 bytes; 41 were announced"):
        read_update(encode(scalars(steps=1, scalars=np.ones(1, np.float32)), 16), bits=16, per_step=2)


def test_paper_byte_counts_of_fedkseed() -> None:
    """4 + 4 K + 8 tau = 17,988 bytes at K = 4096, tau = 200 (arXiv 2312.06353); ours for the same round are fewer."""
    pool = Pool("hadamard", 0, 4096)
    full = PoolCoefficients(pool, np.ones((1, 4096), np.int32), np.zeros(1, np.int32))
    down = len(wire.encode_instruction(instruction(pools=(full,)), 8))
    up = len(encode(scalars(steps=200, scalars=np.ones(200, np.float32)), 16))
    assert 4 + 4 * 4096 + 8 * 200 == 17_988
    assert (down, up) == (4096 + 71, 400 + 37)


HEAD = struct.Struct("<2sBBI")


def tampered_instructions() -> dict[str, tuple[bytes, type[WireError], str]]:
    good = wire.encode_instruction(instruction(), 4)
    weighted = wire.encode_instruction(instruction(draw_weights=np.ones(8, np.uint16)), 4)
    body = 8 + 16 * 3 + 4  # first byte of the first pool
    return {
        "empty": (b"", MalformedMessageError, "ends after 0 bytes"),
        "truncated": (good[:-3], MalformedMessageError, "were announced"),
        "one byte too long": (good + b"\0", MalformedMessageError, "were announced"),
        "foreign magic": (b"XX" + good[2:], MalformedMessageError, "not a fedtune message"),
        "future version": (good[:2] + b"\x09" + good[3:], MalformedMessageError, "install the same fedtune"),
        "wrong kind": (good[:3] + b"\x02" + good[4:], MalformedMessageError, "kind 2"),
        "too many pools": (good[: body - 2] + b"\xff\xff" + good[body:], MismatchError, "at most 3"),
        "no pool": (good[: body - 2] + b"\0\0" + good[body:], MismatchError, "at most 3"),
        "another pool": (good[:body] + b"\0" * 8 + good[body + 8 :], MismatchError, "same seed, family and K"),
        "unknown form": (good[: body + 8] + b"\x07" + good[body + 9 :], MalformedMessageError, "no form 7"),
        "exponent out of range": (good[: body + 9] + b"\x7f" + good[body + 10 :], MalformedMessageError, "exponent"),
        "value outside the grid": (
            good[: body + 10] + b"\0" * 4 + good[body + 14 :],
            MalformedMessageError,
            "outside its grid",
        ),
        "strange flag": (good[:-1] + b"\x03", MalformedMessageError, "kind 3, which does not exist"),
        "announced counts missing": (good[:-1] + b"\x02", MalformedMessageError, "were announced"),
        "more coordinates than seeds": (good[:-1] + b"\x02\x09\x00", MalformedMessageError, "9 coordinates; the pool has 8"),
        "announced weights missing": (good[:-1] + b"\x01", MalformedMessageError, "were announced"),
        "a seed without a chance": (weighted[:-2] + b"\0\0", MalformedMessageError, "no chance"),
    }


@pytest.mark.parametrize("name", tampered_instructions())
def test_a_hostile_instruction_is_refused(name: str) -> None:
    data, kind, text = tampered_instructions()[name]
    with pytest.raises(kind, match=text):
        read_instruction(data)


def tampered_updates() -> dict[str, tuple[bytes, Kind, type[WireError], str]]:
    good = encode(scalars(), 32)
    table = encode(coordinates(), 32)
    nan = scalars(scalars=np.array([1.0, np.nan, 0.0], np.float32))
    s, c, w = Kind.SCALARS, Kind.COORDINATES, Kind.WEIGHTS
    full = encode(weights(), 32)
    return {
        "empty": (b"", s, MalformedMessageError, "ends after 0 bytes"),
        "truncated": (good[:-1], s, MalformedMessageError, "were announced"),
        "too long": (good + b"\0\0\0\0", s, MalformedMessageError, "were announced"),
        "four billion steps": (good[:25] + b"\xff" * 4 + good[29:], s, MalformedMessageError, "at most 50"),
        "more steps than sent": (good[:25] + b"\x05\0\0\0" + good[29:], s, MalformedMessageError, "were announced"),
        "no samples": (good[:29] + b"\0" * 4 + good[33:], s, MalformedMessageError, "on 0 samples"),
        "unknown status": (good[:24] + b"\x09" + good[25:], s, MalformedMessageError, "no status 9"),
        "old round": (encode(scalars(round=3), 32), s, MismatchError, "round 3; this is round 4"),
        "another model": (encode(scalars(digest=b"x" * 16), 32), s, MismatchError, "another model"),
        "no steps": (encode(scalars(steps=0, scalars=np.zeros(0, np.float32)), 32), s, MalformedMessageError, "has no steps"),
        "a loss below zero": (encode(scalars(train_loss=-3e38), 32), s, MalformedMessageError, "training loss is -3e"),
        "a loss of no model": (encode(scalars(train_loss=1.1e6), 32), s, MalformedMessageError, "training loss is 1.1e"),
        "other algorithm": (table, s, MalformedMessageError, "kind 3"),
        "NaN scalar": (encode(nan, 32), s, NonFiniteError, "not finite"),
        "infinite loss": (encode(scalars(train_loss=float("inf")), 32), s, NonFiniteError, "not finite"),
        "weights in place of scalars": (full, s, MalformedMessageError, "kind 4"),
        "scalars in place of weights": (good, w, MalformedMessageError, "kind 2"),
        "a weight too few": (full[:-4], w, MalformedMessageError, "ends after 45 bytes; 49 were announced"),
        "a weight too many": (full + b"\0\0\0\0", w, MalformedMessageError, "has 53 bytes; 49 were announced"),
        "weights of a client that failed": (full[:24] + b"\x01" + full[25:], w, MalformedMessageError, "37 were announced"),
        "NaN weight": (full[:-4] + b"\0\0\xc0\x7f", w, NonFiniteError, "not finite"),
        "more coordinates than seeds": (
            encode(coordinates(counts=np.array([9, 0, 2])), 32), c, MalformedMessageError, "the pool has 8",
        ),
        "fewer coordinates than announced": (
            encode(coordinates(counts=np.array([2, 0, 2])), 32), c, MalformedMessageError, "were announced",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", tampered_updates())
def test_a_hostile_update_is_refused(name: str) -> None:
    data, kind, error, text = tampered_updates()[name]
    with pytest.raises(error, match=text):
        read_update(data, kind)


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (scalars(steps=50, scalars=np.ones(50, np.float32)), Kind.SCALARS),
        (scalars(train_loss=0.0), Kind.SCALARS),
        (scalars(train_loss=wire.LARGEST_LOSS), Kind.SCALARS),
        (scalars(examples=1), Kind.SCALARS),
        (scalars(status=Status.NOT_FINITE, steps=0, scalars=np.zeros(0, np.float32)), Kind.SCALARS),
        (coordinates(counts=np.array([8, 0, 2]), scalars=np.ones(10, np.float32)), Kind.COORDINATES),
    ],
    ids=["most steps", "no loss", "largest loss", "one sample", "no step of a client that failed", "all coordinates"],
)
def test_what_is_just_allowed_is_read(sent: Update, kind: Kind) -> None:
    got = read_update(encode(sent, 32), kind)
    assert (got.steps, got.examples, got.train_loss, got.status) == (sent.steps, sent.examples, sent.train_loss, sent.status)
    assert (got.counts.tolist(), got.scalars.tolist()) == (sent.counts.tolist(), sent.scalars.tolist())
    assert (got.counts.dtype, got.scalars.dtype) == (np.int64, np.float32)


def test_all_coordinates_of_a_block_may_be_asked_for() -> None:
    sent = instruction(counts=np.array([8], dtype=np.uint16))
    assert read_instruction(wire.encode_instruction(sent, 4)).counts.tolist() == [8]


def test_the_head_alone_names_base_and_model() -> None:
    data = wire.encode_instruction(instruction(), 4)
    assert wire.named_state(data[:60]) == (DIGEST, FINGERPRINT)
    with pytest.raises(MalformedMessageError, match="ends after 59 bytes"):
        wire.named_state(data[:59])


def heads() -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    """What a sound message begins with, up to where a round's own numbers end, and its reader."""
    sound = {Kind.SCALARS: scalars(), Kind.COORDINATES: coordinates(), Kind.WEIGHTS: weights()}
    found: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
        kind.name: (encode(update, 32)[:24], partial(read_update, kind=kind)) for kind, update in sound.items()
    }
    plain = wire.encode_instruction(instruction(), 4)
    return found | {"INSTRUCTION": (plain[:60], read_instruction), "pool": (plain[:72], read_instruction)}


@pytest.mark.parametrize("name", heads())
def test_a_head_is_sound_so_what_follows_it_is_read(name: str) -> None:
    head, read = heads()[name]
    with pytest.raises(MalformedMessageError, match=rf"ends after {len(head)} bytes; \d+ were announced"):
        read(head)


@pytest.mark.parametrize("name", heads())
@settings(max_examples=100, deadline=None)
@given(noise=st.binary(max_size=200), with_head=st.booleans())
def test_random_bytes_never_cause_anything_but_a_wire_error(name: str, noise: bytes, with_head: bool) -> None:
    head, read = heads()[name]
    with contextlib.suppress(WireError):
        read(head + noise if with_head else noise)


# ---------------------------------------------------------------------------------------------------- differences


def chain(bits: int = 8, size: int = 64, blocks: int = 2) -> list[PoolCoefficients]:
    """A pool that grows from round to round, with exponents that change on the way."""
    generator, pool = np.random.default_rng(5), Pool("hadamard", 0, size)
    values, states = np.zeros((blocks, size)), []
    for number in range(12):
        moved = generator.random((blocks, size)) < 0.1
        values = values + moved * generator.standard_normal((blocks, size)) * 1.5**number
        states.append(quantise(pool, values, bits))
    return states


@pytest.mark.parametrize("bits", [2, 8, 24])
@pytest.mark.parametrize("missed", [1, 2, 5])
def test_a_difference_leads_to_the_same_coefficients(bits: int, missed: int) -> None:
    states = chain(bits)
    assert len({tuple(state.exponents.tolist()) for state in states}) > 2
    for before, after in zip(states, states[missed:], strict=False):
        written = packing.encode_pool(after, bits, before)
        got = packing.decode_pool(written, after.pool, 2, bits, lambda known=before: known)
        assert got.identity == after.identity
        assert len(written) <= len(packing.encode_pool(after, bits))


def test_what_changed_is_less_than_everything() -> None:
    """K = 4096 at 8 bits; 100 coefficients changed by a little: a bitmap, and 3 bits each."""
    pool = Pool("hadamard", 0, 4096)
    before = PoolCoefficients(pool, np.full((1, 4096), 5, np.int32), np.array([-20], np.int32))
    changed = before.q.copy()
    changed[0, :100] += 3
    after = PoolCoefficients(pool, changed, before.exponents)
    assert len(packing.encode_pool(after, 8)) == 8 + 1 + 1 + 4096
    assert len(packing.encode_pool(after, 8, before)) == 8 + 1 + 1 + 8 + 1 + 512 + 38
    assert len(packing.encode_pool(before, 8, before)) == 8 + 1 + 1 + 8 + 1 + 512


def test_golden_bytes_of_a_difference() -> None:
    """From [1, -3, 0, 7, 0, 0, -7, 2] * 2^-20 to a grid twice as coarse: halves go to the even number."""
    before = coefficients()
    after = PoolCoefficients(POOLS[0], np.array([[0, -2, 0, 4, 0, 1, -4, 1]], np.int32), np.array([-19], np.int32))
    written = packing.encode_pool(after, 24, before)
    assert written.hex() == POOLS[0].identity.hex() + "03" + "ed" + before.identity[:8].hex() + "02" + "20" + "03"
    assert packing.decode_pool(written, POOLS[0], 1, 24, lambda: before).q.tolist() == after.q.tolist()


def test_a_pool_is_never_a_difference_from_another_pool() -> None:
    other = PoolCoefficients(POOLS[1], coefficients().q, coefficients().exponents)
    assert packing.encode_pool(coefficients(), 4, other) == packing.encode_pool(coefficients(), 4)


def test_the_first_pool_of_an_instruction_may_be_a_difference() -> None:
    """The pool that was open when the client answered, in an instruction that closes it."""
    before, after = coefficients(), coefficients(values=[1, -3, 0, 8, 0, 0, -7, 2])
    sent = instruction(held=0, pools=(after, coefficients(1, [0] * 8)), known=before)
    data = wire.encode_instruction(sent, 24)
    asked: list[int] = []

    def known_at(number: int) -> PoolCoefficients:
        asked.append(number)
        return before

    got = wire.decode_instruction(data, POOLS.__getitem__, lambda round: len(POOLS), 1, 24, known_at)
    assert [pool.identity for pool in got.pools] == [pool.identity for pool in sent.pools]
    assert asked == [0]
    with pytest.raises(StaleReplicaError, match="since a state that this client does not hold"):
        read_instruction(data, 24)


def difference() -> tuple[PoolCoefficients, bytes]:
    before = coefficients()
    after = PoolCoefficients(POOLS[0], before.q + np.eye(1, 8, dtype=np.int32), before.exponents)
    return before, packing.encode_pool(after, 24, before)


@pytest.mark.parametrize(
    ("at", "value", "error", "text"),
    [
        (9, 0x7F, MalformedMessageError, "exponent is outside"),
        (10, None, StaleReplicaError, "does not hold"),
        (18, 1, MalformedMessageError, "2 to 25 bits, not 1"),
        (18, 26, MalformedMessageError, "2 to 25 bits, not 26"),
        (19, 0xFF, MalformedMessageError, "were announced"),
        (20, 0, MalformedMessageError, "outside its grid"),
        (20, 0xFF, MalformedMessageError, "Padding bits"),
    ],
)
def test_a_hostile_difference_is_refused(at: int, value: int | None, error: type[Exception], text: str) -> None:
    before, data = difference()
    changed = bytearray(data)
    changed[at] = value if value is not None else changed[at] ^ 1
    with pytest.raises(error, match=text):
        packing.decode_pool(bytes(changed), POOLS[0], 1, 24, lambda: before)


def test_a_difference_beyond_the_grid_is_refused() -> None:
    before, data = difference()
    with pytest.raises(MalformedMessageError, match="outside its grid"):
        packing.decode_pool(data[:9] + b"\xe8" + data[10:], POOLS[0], 1, 4, lambda: before)


@pytest.mark.parametrize(("more", "taken"), [(1, True), (2, False)])
def test_a_difference_leads_to_the_largest_of_its_grid_and_not_beyond(more: int, taken: bool) -> None:
    """4 bits: 7 is the largest."""
    before = coefficients(values=[6, 1, 1, 1, 1, 1, 1, 1])
    after = PoolCoefficients(POOLS[0], before.q + more * np.eye(1, 8, dtype=np.int32), before.exponents)
    data = packing.encode_pool(after, 24, before)
    assert data[8] == packing.Form.DIFFERENCE
    if taken:
        assert packing.decode_pool(data, POOLS[0], 1, 4, lambda: before).q.tolist() == after.q.tolist()
    else:
        with pytest.raises(MalformedMessageError, match="outside its grid"):
            packing.decode_pool(data, POOLS[0], 1, 4, lambda: before)


@pytest.mark.parametrize(("had", "on_the_grid"), [(2**22 - 1, 2**23 - 2), (-(2**22), 0), (2**22, 0)])
def test_what_is_too_large_for_a_finer_grid_counts_as_zero(had: int, on_the_grid: int) -> None:
    """Above 2^23 - 1, the largest of 24 bits: the difference is then the new coefficient."""
    pool, others = Pool("hadamard", 0, 64), np.arange(1, 64)
    before = PoolCoefficients(pool, np.append(had, others).astype(np.int32)[None], np.array([1], np.int32))
    after = PoolCoefficients(pool, np.append(on_the_grid - 7, 2 * others).astype(np.int32)[None], np.array([0], np.int32))
    data = packing.encode_pool(after, 24, before)
    assert packing.decode_pool(data, pool, 1, 24, lambda: before).q.tolist() == after.q.tolist()
    assert (data[8], data[18]) == (packing.Form.DIFFERENCE, 4)  # one number of 4 bits: -7


def test_coefficients_beyond_exact_sums_are_refused() -> None:
    heavy = PoolCoefficients(POOLS[0], np.full((1, 8), 2**23 - 1, np.int32), np.zeros(1, np.int32))
    with pytest.raises(MalformedMessageError, match="too large for exact sums"):
        packing.decode_pool(packing.encode_pool(heavy, 24), POOLS[0], 1, 24)


def test_axes_have_no_sums_and_are_never_a_difference() -> None:
    pool = Pool("axes", 0, 8)
    full = PoolCoefficients(pool, np.full((1, 8), 2**31 - 1, np.int32), np.zeros(1, np.int32))
    written = packing.encode_pool(full, 32, full)
    assert packing.decode_pool(written, pool, 1, 32).q.tolist() == full.q.tolist()
    with pytest.raises(MalformedMessageError, match="no form 3"):
        packing.decode_pool(written[:8] + b"\x03" + written[9:], pool, 1, 32)
    with pytest.raises(MalformedMessageError, match="too large for exact sums"):  # 2^31 2^100 is no float32
        packing.decode_pool(written[:9] + b"\x64" + written[10:], pool, 1, 32)
