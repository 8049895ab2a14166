"""A message of 64 KB takes at most 64 MB and one second to read, whatever it says and whatever L and K are."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from struct import pack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import worker
from client.pools import DecodedPools, leading
from fedtune import bits as words
from fedtune import packing, selftest, wire
from fedtune.coefficients import PoolCoefficients
from fedtune.directions.base import Pool
from fedtune.errors import FedtuneError, MalformedMessageError, MismatchError, StaleReplicaError
from fedtune.packing import Form
from fedtune.seeds import stream_key
from fedtune.wire import Kind, Update

MESSAGE, MEMORY, SECONDS = 64 << 10, 64e6, 1.0
HEAD = b"FT" + bytes([wire.VERSION, Kind.INSTRUCTION]) + pack("<I", 5) + bytes(48)


@cache
def pool(number: int, size: int) -> Pool:
    return Pool("hadamard", stream_key(0, "pool", number), size)


def known(blocks: int, size: int, bits: int) -> Callable[[int], PoolCoefficients]:
    q = np.ones((blocks, size), words.narrowest(bits))
    return lambda number: PoolCoefficients(pool(number, size), q, np.zeros(blocks, np.int32))


def filled(blocks: int, size: int, one: Callable[[Pool], bytes]) -> bytes:
    """An instruction of at most MESSAGE bytes with as many pools as fit; at least one, cut off if need be."""
    pools, length = [], len(HEAD) + 5
    for number in range(65535):
        written = pool(number, size).identity + one(pool(number, size))
        if pools and length + len(written) > MESSAGE:
            break
        pools.append(written)
        length += len(written)
    return (HEAD + pack("<HH", 0, len(pools)) + b"".join(pools) + b"\x00")[:MESSAGE]


def cost(read: Callable[[], object]) -> tuple[float, float, str]:
    """Peak of the memory that numpy and Python take, seconds of CPU, and what was said."""

    def said() -> str:
        try:
            read()
        except FedtuneError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    begun = time.process_time()
    said()
    seconds = time.process_time() - begun
    tracemalloc.start()
    try:
        text = said()
        return tracemalloc.get_traced_memory()[1], seconds, text
    finally:
        tracemalloc.stop()


def check(read: Callable[[], object]) -> str:
    """What was said, at no more than MEMORY and SECONDS."""
    peak, seconds, said = cost(read)
    assert peak < MEMORY, f"{peak / 1e6:.0f} MB: {said}"
    assert seconds < SECONDS, f"{seconds:.2f} s: {said}"
    return said


SHAPES = [(1, 64), (41, 4096), (5000, 65535), (20_000, 4096)]


def writers(blocks: int, size: int, bits: int) -> dict[str, Callable[[Pool], bytes]]:
    """Pools that are small on the wire."""
    count = blocks * size
    bitmap = bytes((count + 7) // 8) if count < 8 * MESSAGE else b""
    middle = 1 << (bits - 1)
    packed = words.pack_integers(np.zeros(count, np.int32), bits) if count < 1 << 19 else b""
    exponents = bytes(blocks)
    name = known(blocks, size, bits)(0).identity[:8] if count < 1 << 19 else bytes(8)
    longest = pack("<H", min(size, 65535)) + bytes(2 * blocks - 2) + pack("<I", middle)[: (bits + 7) // 8] * min(size, 65535)
    return {
        "zero": lambda pool: bytes([Form.ZERO]),
        "dense": lambda pool: bytes([Form.DENSE]) + exponents + packed,
        "sparse": lambda pool: bytes([Form.SPARSE]) + exponents + bitmap,
        "prefixes": lambda pool: bytes([Form.PREFIXES]) + exponents + bytes(2 * blocks),
        "one long prefix": lambda pool: bytes([Form.PREFIXES]) + exponents + longest,
        "difference": lambda pool: bytes([Form.DIFFERENCE]) + exponents + name + bytes([2]) + bitmap,
    }


@pytest.mark.parametrize(
    ("form", "bits"), [(form, bits) for form in writers(1, 8, 2) for bits in (2, 24) if (form, bits) != ("zero", 24)]
)
def test_an_instruction_of_64_kb_is_bounded(form: str, bits: int) -> None:
    for blocks, size in SHAPES[1:2] if form == "zero" else SHAPES if bits == 2 else [(1, 65535), SHAPES[-1]]:
        data = filled(blocks, size, writers(blocks, size, bits)[form])
        start = known(blocks, size, bits) if blocks * size < 1 << 19 else lambda number: None
        check(
            lambda data=data, blocks=blocks, size=size, start=start: wire.decode_instruction(
                data, lambda number: pool(number, size), lambda round: 65535, blocks, bits, start
            )
        )


def test_what_is_measured_is_reached() -> None:
    """The cases above are not all refused at their first byte: zero pools and prefixes are read until the room is used up."""
    zeros = filled(41, 4096, writers(41, 4096, 8)["zero"])
    got = wire.decode_instruction(zeros, lambda n: pool(n, 4096), lambda round: 65535, 41, 8)
    assert len(got.pools) > 7000
    assert all(one.is_zero for one in got.pools)
    prefixes = filled(1, 65535, writers(1, 65535, 8)["prefixes"])
    with pytest.raises(MalformedMessageError, match=r"would take 16,\d+,\d+ bytes of memory when it is read"):
        wire.decode_instruction(prefixes, lambda n: pool(n, 65535), lambda round: 65535, 1, 8)


def test_an_instruction_has_no_more_pools_than_its_round() -> None:
    zeros = filled(1, 64, writers(1, 64, 8)["zero"])
    with pytest.raises(MismatchError, match="speaks of 7275 pools; in round 5 it has at most 5"):
        wire.decode_instruction(zeros, lambda n: pool(n, 64), lambda round: round, 1, 8)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_instruction_is_expensive(data: st.DataObject) -> None:
    """Pools of any form, whose bytes are noise."""
    blocks, size = data.draw(st.sampled_from(SHAPES))
    width = data.draw(st.integers(2, 24))
    pools = data.draw(
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.binary(max_size=40)), min_size=1, max_size=40)
    )
    written = [
        pool(number, size).identity + bytes([form]) + bytes(blocks) * (padding > 0) + bytes(2 * blocks) * (padding > 1) + noise
        for number, (form, padding, noise) in enumerate(pools)
    ]
    message = (HEAD + pack("<HH", 0, len(pools)) + b"".join(written))[:MESSAGE]
    check(lambda: wire.decode_instruction(message, lambda n: pool(n, size), lambda round: 65535, blocks, width))


# ---------------------------------------------------------------------------------------------------- what is written is read


@pytest.mark.parametrize("width", [2, 5, 8, 11, 16, 24])
def test_the_writer_keeps_to_the_room_that_the_reader_has(width: int) -> None:
    """Pools whose shortest form is prefixes, more of them than there is room for: the last are written otherwise."""
    size, blocks = 65535, 8
    q = np.zeros((blocks, size), words.narrowest(width))
    q[:, 0] = 1
    each = packing.prefix_bytes(q.size, width)
    count = packing.PREFIX_ROOM // each + 2
    pools = tuple(PoolCoefficients(pool(n, size), q, np.zeros(blocks, np.int32)) for n in range(count))
    sent = wire.Instruction(count, bytes(16), bytes(16), bytes(16), 0, pools, np.zeros(0, np.uint16))
    data = wire.encode_instruction(sent, width)
    got = wire.decode_instruction(data, lambda n: pool(n, size), lambda round: round, blocks, width)
    assert [one.identity for one in got.pools] == [one.identity for one in pools]
    assert {one.q.dtype for one in got.pools} == {np.dtype(words.narrowest(width))}
    assert len(data) > 2 * q.size // 8 > len(packing.encode_pool(pools[0], width))


def test_a_zero_pool_is_one_number_and_the_same_as_a_full_one() -> None:
    shared, full = PoolCoefficients.zero(pool(0, 4096), 41), np.zeros((41, 4096), np.int32)
    assert shared.identity == PoolCoefficients(pool(0, 4096), full, np.zeros(41, np.int32)).identity
    assert shared.is_zero
    assert (shared.nbytes, shared.q.shape, shared.values.shape) == (0, (41, 4096), (41, 4096))
    assert not shared.values.any()
    with pytest.raises(ValueError, match="read-only"):
        shared.q[0, 0] = 1
    weights = Pool("axes", 0, 7_000_000_000)
    written = packing.encode_pool(PoolCoefficients.zero(weights, 1), 32)
    assert cost(lambda: packing.decode_pool(written, weights, 1, 32))[0] < 1e5


@pytest.mark.parametrize("width", range(2, 33))
def test_whole_numbers_survive_in_any_number(width: int) -> None:
    limit = 2 ** (width - 1) - 1
    for count in (0, 1, 7, words.AT_ONCE - 1, words.AT_ONCE, words.AT_ONCE + 3):
        values = np.random.default_rng(count).integers(-limit, limit, count, endpoint=True).astype(np.int32)
        packed = words.pack_integers(values, width)
        assert len(packed) == words.packed_length(count, width)
        assert words.unpack_integers(packed, count, width).tolist() == values.tolist()


@pytest.mark.parametrize("width", [3, 8, 12, 16, 24, 32])
def test_a_long_message_takes_a_small_multiple_of_its_bytes(width: int) -> None:
    """Weights of a model: 24 million bytes here."""
    data = b"\x55" * 24_000_000
    count = len(data) * 8 // width
    peak, _, _ = cost(lambda: words.unpack_integers(data, count, width))
    assert peak < 4 * len(data) + 2_000_000


@pytest.mark.parametrize("width", [16, 32])
def test_weights_take_a_small_multiple_of_their_bytes(width: int) -> None:
    scalars = np.ones(2_000_000, np.float32)
    update = Update(5, bytes(16), wire.Status.FINISHED, 1, 1, 0.0, scalars, np.zeros(0, np.int64), weights=True)
    data = wire.encode_update(update, width, client="0")
    peak, seconds, said = cost(
        lambda: wire.decode_update(
            data,
            kind=Kind.WEIGHTS,
            round=5,
            digest=bytes(16),
            client="0",
            max_steps=1,
            blocks=1,
            max_count=1,
            bits=width,
            parameters=len(scalars),
        )
    )
    assert said == ""
    assert peak < 8 * len(data)
    assert seconds < SECONDS


@pytest.mark.parametrize("width", [4, 8, 16, 32])
def test_an_update_of_64_kb_is_bounded(width: int) -> None:
    head = b"FT" + bytes([wire.VERSION, Kind.COORDINATES]) + pack("<I", 5)
    head += wire.answer(bytes(16), 5, "0") + bytes(1) + pack("<IIf", 1, 1, 0.0)
    for blocks, counts in ((30_000, b"\x00"), (4, b"\xff"), (1, b"\xff"), (10_000, b"\xff")):
        data = (head + counts * 2 * blocks + bytes(MESSAGE))[:MESSAGE]
        said = check(
            lambda data=data, blocks=blocks: wire.decode_update(
                data,
                kind=Kind.COORDINATES,
                round=5,
                digest=bytes(16),
                client="0",
                max_steps=1,
                blocks=blocks,
                max_count=65535,
                bits=width,
            )
        )
        assert said.startswith("MalformedMessageError")


@given(st.binary(max_size=300))
def test_a_self_test_is_bounded_by_its_form(noise: bytes) -> None:
    for data in (noise, b"FS\x01" + noise):
        with contextlib.suppress(MalformedMessageError):
            assert len(selftest.decode(data).samples) in (0, 64)
    with pytest.raises(MalformedMessageError, match="65536 bytes was announced"):
        selftest.decode(b"FS\x01" + bytes(MESSAGE - 3))


# ---------------------------------------------------------------------------------------------------- what a client keeps


def test_decoded_pools_make_room_by_their_bytes() -> None:
    kept, decoded = DecodedPools(most_bytes=3 * 5000), []

    def decode(data: bytes, of: Pool, blocks: int, bits: int) -> PoolCoefficients:
        decoded.append(data)
        return PoolCoefficients(of, np.ones((blocks, of.size), np.int8), np.zeros(blocks, np.int32))

    for name in (b"a", b"b", b"c", b"a", b"d", b"a", b"b"):
        assert kept.of(name, pool(0, 4096), 1, 8, decode).q.size == 4096
        assert kept.bytes <= 3 * 5000
    assert decoded == [b"a", b"b", b"c", b"d", b"b"]
    kept.of(b"large", pool(0, 4096), 8, 8, decode)
    assert kept.bytes == 0


def test_a_client_keeps_the_leading_pools_up_to_a_limit() -> None:
    assert leading([b"123", b"45", b"678", b""], 5) == [b"123", b"45"]
    assert leading([b"123"], 2) == []
    assert leading([b"1", b"", b"2"], 5) == [b"1", b"", b"2"]


def test_a_model_of_too_many_kept_pools_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q = np.ones((1, 64), np.int8)
    held = [packing.encode_pool(PoolCoefficients(pool(n, 64), q, np.zeros(1, np.int32)), 8) for n in range(5)]
    kept = worker._Kept(held, lambda number: pool(number, 64), 1, 8)
    assert len(kept.first(5)) == 5
    with pytest.raises(StaleReplicaError, match="builds upon 6 pools; this client holds 5"):
        kept.first(6)
    monkeypatch.setattr(worker, "MOST_OF_A_MODEL", 3 * 68)
    with pytest.raises(MalformedMessageError, match="The first 4 pools of the message take more than 204 bytes"):
        kept.first(5)
    assert len(kept.first(3)) == 3


def test_only_the_first_pool_may_be_a_difference() -> None:
    start = known(1, 64, 8)
    one = writers(1, 64, 8)["difference"](pool(0, 64))
    for name in (start(0).identity[:8], start(1).identity[:8]):
        second = one[:2] + name + one[10:]
        pools = [(pool(0, 64).identity + one), (pool(1, 64).identity + second)]
        for count, read in ((1, True), (2, False)):
            data = HEAD + pack("<HH", 0, count) + b"".join(pools[:count]) + b"\x00"
            if read:
                assert wire.decode_instruction(data, lambda n: pool(n, 64), lambda round: 5, 1, 8, start).pools[0].q.all()
            else:
                with pytest.raises(StaleReplicaError):
                    wire.decode_instruction(data, lambda n: pool(n, 64), lambda round: 5, 1, 8, start)
