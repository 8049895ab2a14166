"""Messages: instructions, updates of every kind and width, pools in five forms, and self-tests."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import strategies as st

from fedtune import packing, selftest, wire
from fedtune.bits import packed_length
from fedtune.directions.base import Pool
from fedtune.errors import StaleReplicaError, WireError
from fedtune.packing import Form
from fedtune.wire import Kind
from tests.fuzz import messages
from tests.fuzz.harness import LARGEST, bounded, fuzz
from tests.fuzz.messages import ASKED, HEAD, SHAPES, Asked, Shape
from tests.fuzz.mutations import mutated, noise

REFUSED = (WireError, StaleReplicaError)


def of_a_shape(sound: object) -> st.SearchStrategy[tuple[Shape, bytes]]:
    """A shape, and a message of it with faults."""
    return st.sampled_from(SHAPES).flatmap(lambda shape: st.tuples(st.just(shape), mutated(sound(shape))))


# ---------------------------------------------------------------------------------------------------- the sound ones


def test_the_messages_that_the_fuzzers_begin_from_are_sound_and_of_every_form() -> None:
    """Otherwise every input would be refused at its first byte."""
    forms = set()
    for shape in SHAPES:
        for data in messages.pools(shape):
            forms.add(data[8])
            got = packing.decode_pool(data, shape.pool(0), shape.blocks, shape.bits, lambda shape=shape: messages.known(shape))
            assert got.pool == shape.pool(0)
        assert all(messages.read_instruction(shape, data).round == messages.ROUND for data in messages.instructions(shape))
    assert forms == set(Form)
    assert all(messages.read_update(asked, data).examples == 120 for asked in ASKED for data in messages.updates(asked))


def test_most_inputs_pass_the_head_of_their_reader() -> None:
    """Random bytes behind a sound head are refused for what they say, not for their version."""
    for asked in ASKED:
        body = messages.updates(asked)[0][4:]
        with pytest.raises(WireError, match="announced"):
            messages.read_update(asked, HEAD + bytes([asked.kind]) + body + b"?")


# ---------------------------------------------------------------------------------------------------- instructions


def heads(shape: Shape) -> list[bytes]:
    """Of instructions, up to the first pool."""
    return [data[:68] + data[68:76] for data in messages.instructions(shape)]


def read(shape: Shape, data: bytes) -> None:
    found = bounded(data, lambda message: messages.read_instruction(shape, message), REFUSED)
    if found is None:
        return
    again = messages.read_instruction(shape, wire.encode_instruction(found, shape.bits))
    assert [pool.identity for pool in again.pools] == [pool.identity for pool in found.pools]
    assert (again.held, again.round, again.digest) == (found.held, found.round, found.digest)
    assert again.draw_weights.tolist() == found.draw_weights.tolist()
    assert again.counts.tolist() == found.counts.tolist()


@fuzz(of_a_shape(messages.instructions), short=100)
def test_an_instruction_with_faults_is_read_or_refused(found: tuple[Shape, bytes]) -> None:
    read(*found)


@fuzz(st.sampled_from(SHAPES).flatmap(lambda shape: st.tuples(st.just(shape), noise(HEAD + b"\1", *heads(shape)))), short=100)
def test_noise_is_no_instruction(found: tuple[Shape, bytes]) -> None:
    read(*found)


def crowded(shape: Shape, form: Form) -> bytes:
    """As many pools as fit into a message, each in a form that takes a few bytes for many coefficients."""
    exponents = bytes(shape.blocks) if form != Form.ZERO else b""
    marks = {Form.PREFIXES: 2 * shape.blocks, Form.SPARSE: packed_length(shape.blocks * shape.size, 1)}.get(form, 0)
    body = bytes([form]) + exponents + bytes(marks)
    sent = (LARGEST - 70) // (8 + len(body))
    head = HEAD + b"\1" + struct.pack("<I16s16s16sHH", 1, b"f" * 16, b"l" * 16, b"d" * 16, 0, sent)
    return head + b"".join(shape.pool(number).identity + body for number in range(sent)) + b"\0"


@pytest.mark.parametrize("shape", [Shape(41, 4096, 8), Shape(1, 65535, 2)], ids=["41 blocks", "1 block"])
@pytest.mark.parametrize("form", [Form.ZERO, Form.PREFIXES, Form.SPARSE])
def test_many_pools_that_say_nothing_take_no_memory(shape: Shape, form: Form) -> None:
    """A zero pool is 9 bytes, and one of prefixes without any a few more, for L x K coefficients."""
    data = crowded(shape, form)
    assert LARGEST // 2 < len(data) <= LARGEST
    bounded(data, lambda message: messages.read_instruction(shape, message), REFUSED, measured=True)


# ---------------------------------------------------------------------------------------------------- pools


@fuzz(of_a_shape(messages.pools), short=100)
def test_a_pool_with_faults_is_read_or_refused(found: tuple[Shape, bytes]) -> None:
    shape, data = found
    pool = shape.pool(0)

    def decode(message: bytes) -> packing.PoolCoefficients:
        return packing.decode_pool(message, pool, shape.blocks, shape.bits, lambda: messages.known(shape))

    got = bounded(data, decode, REFUSED)
    if got is not None:
        assert decode(packing.encode_pool(got, shape.bits)).identity == got.identity
        assert np.isfinite(got.values).all()


@fuzz(noise(*(Pool("hadamard", 0, 48).identity + bytes([form]) for form in range(6))), short=100)
def test_noise_is_no_pool(data: bytes) -> None:
    shape = SHAPES[1]
    bounded(data, lambda m: packing.decode_pool(m, shape.pool(0), 3, 8, lambda: messages.known(shape)), REFUSED)


# ---------------------------------------------------------------------------------------------------- updates


def take(asked: Asked, data: bytes) -> None:
    """As the server does; what is accepted is finite, and where a number is sent alone its bytes are the only ones for it."""
    got = bounded(data, lambda message: messages.read_update(asked, message), WireError)
    if got is None:
        return
    assert np.isfinite(got.scalars).all()
    assert np.isfinite(got.train_loss)
    assert 0 <= got.steps <= messages.STEPS
    if asked.kind != Kind.COORDINATES or asked.bits >= 16:
        assert messages.encode_update(got, asked) == data


def updates_of(asked: Asked) -> st.SearchStrategy[tuple[Asked, bytes]]:
    return st.tuples(st.just(asked), mutated(messages.updates(asked)))


@fuzz(st.sampled_from(ASKED).flatmap(updates_of), short=200)
def test_an_update_with_faults_is_read_or_refused(found: tuple[Asked, bytes]) -> None:
    take(*found)


@fuzz(
    st.sampled_from(ASKED).flatmap(
        lambda asked: st.tuples(
            st.just(asked),
            noise(*(messages.updates(asked)[0][:length] for length in (3, 4, 8, 24, 37)), HEAD + bytes([asked.kind])),
        )
    ),
    short=200,
)
def test_noise_is_no_update(found: tuple[Asked, bytes]) -> None:
    take(*found)


# ---------------------------------------------------------------------------------------------------- self-tests


TESTS = [selftest.encode(selftest.self_test(Pool(family, 3, 64))) for family in ("hadamard", "gaussian")]


@fuzz(mutated(TESTS) | noise(TESTS[0][:2], TESTS[0][:3], TESTS[1][:12]))
def test_a_self_test_is_read_or_refused(data: bytes) -> None:
    got = bounded(data, selftest.decode, WireError)
    if got is not None:
        assert selftest.encode(got) == data or not np.isfinite(got.samples).all()  # a NaN has many bits
        for ours in map(selftest.decode, TESTS):
            assert (selftest.differences(ours, got) == []) == (got.digests == ours.digests and near(ours.samples, got.samples))


def near(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    """The definition: a 1024th of 1 + |value| apart on float32, a 64th on bfloat16, which alternate by operation."""
    bounds = [bound for bound in (2.0**-10, 2.0**-6) * 2 for _ in range(selftest.SAMPLES)]
    pairs = zip(ours, theirs, bounds, strict=False)
    return len(ours) == len(theirs) and all(abs(one - other) <= bound * (1.0 + abs(one)) for one, other, bound in pairs)
