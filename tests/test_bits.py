"""Bits of numbers: whole numbers as Python has them, scalars to the nearest, coordinates within half a unit of their block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import bits as words
from fedtune.errors import MalformedMessageError


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 32), st.data())
def test_packed_integers_survive(bits: int, data: st.DataObject) -> None:
    limit = 2 ** (bits - 1) - 1
    values = np.array(data.draw(st.lists(st.integers(-limit, limit), max_size=40)), dtype=np.int32)
    packed = words.pack_integers(values, bits)
    assert len(packed) == -(-len(values) * bits // 8)
    assert words.unpack_integers(packed, len(values), bits).tolist() == values.tolist()


@pytest.mark.parametrize("bits", [3, 8, 13])
def test_many_packed_integers_are_one_number_of_binary_digits(bits: int) -> None:
    """Against Python's whole numbers; more of them than are spread at a time."""
    limit, count = 2 ** (bits - 1) - 1, 2 * words.AT_ONCE + 3
    values = np.random.default_rng(bits).integers(-limit, limit + 1, size=count).astype(np.int32)
    digits = "".join(format(value + limit + 1, f"0{bits}b") for value in values[::-1].tolist())
    packed = words.pack_integers(values, bits)
    assert packed == int(digits, 2).to_bytes(-(-count * bits // 8), "little")
    assert words.unpack_integers(packed, count, bits).tolist() == values.tolist()


def test_halves_go_to_the_even_neighbour() -> None:
    def rounded(bits: int, *values: float) -> list[float]:
        return [float(value) for value in words.round_scalars(np.array(values, dtype=np.float32), bits)]

    assert rounded(16, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8) == [1.0, 1 + 2**-6, -1.0]
    assert rounded(8, 1.125, 1.375, -1.125, 1.13) == [1.0, 1.5, -1.0, 1.25]


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_no_pattern_of_a_nan_becomes_a_number(bits: int) -> None:
    patterns = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFF800001, 0x7F800000], dtype=np.uint32)
    got = words.round_scalars(patterns.view(np.float32), bits)
    assert np.isnan(got[:-1]).all()
    assert got[-1] == np.inf


def test_a_unit_is_no_larger_than_its_block_needs() -> None:
    """7 and -14 at 4 bits, |q| <= 7: units 1 and 2, which bfloat16 has; nothing, and 7.0001, which need 0 and one step more."""
    sizes = np.array([1, 1, 0, 1])
    data = words.pack_blocks(np.array([7.0, -14.0, 7.0001], np.float32), sizes, 4)
    assert data.hex() == "803f" + "0040" + "0000" + "813f" + "1f" + "0f"
    assert words.unpack_blocks(words.Reader(data), sizes, 4).tolist() == [7.0, -14.0, 7 * (1 + 2**-7)]


def test_a_block_of_zeros_or_of_what_is_not_finite_has_no_other_numbers() -> None:
    data = words.pack_blocks(np.array([0.0, 0.0, np.inf, 1.0], np.float32), np.array([2, 2]), 4)
    assert data.hex() == "0000" + "807f" + "88" + "88"


@given(st.floats(-60000.0, 60000.0, width=32))
def test_eight_bit_scalars_are_near_and_stay(value: float) -> None:
    rounded = float(words.round_scalars(np.array([value], dtype=np.float32), 8)[0])
    assert abs(rounded - value) <= max(abs(value) / 8, 2.0**-17 * 1.01)
    assert float(words.round_scalars(np.array([rounded], dtype=np.float32), 8)[0]) == rounded


def test_what_is_too_large_or_not_finite_for_eight_bits() -> None:
    sent = np.array([1e9, -1e9, np.inf, -np.inf, np.nan, 57344.0], dtype=np.float32)
    got = words.round_scalars(sent, 8)
    assert got[[0, 1, 5]].tolist() == [57344.0, -57344.0, 57344.0]
    assert not np.isfinite(got[2:5]).any()
    assert np.isnan(got[4])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
def test_coordinates_are_within_half_a_unit_of_their_block(counts: list[int], bits: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(counts)), counts)
    values = (random.normal(size=len(owner)) * 10.0 ** random.uniform(-6, 6, size=len(counts))[owner]).astype(np.float32)
    sizes = np.array(counts, dtype=np.int64)
    data = words.pack_blocks(values, sizes, bits)
    assert len(data) == 2 * len(counts) + -(-len(values) * bits // 8)
    reader = words.Reader(data)
    got = words.unpack_blocks(reader, sizes, bits)
    reader.finish()
    largest = np.array([np.abs(values[owner == block]).max(initial=0.0) for block in range(len(counts))])
    assert (np.abs(got - values) <= 0.51 * 1.008 * largest[owner] / (2 ** (bits - 1) - 1)).all()


@given(st.floats(-(2.0**120), 2.0**120, width=32))
def test_sixteen_bit_scalars_are_the_nearest_ones(value: float) -> None:
    rounded = float(words.round_scalars(np.array([value], dtype=np.float32), 16)[0])
    assert abs(rounded - value) <= abs(value) * 2.0**-8 or abs(value) < 2.0**-120
    again = words.round_scalars(np.array([rounded], dtype=np.float32), 16)
    assert float(again[0]) == rounded


SPECIAL = [
    0x7F800000,
    0xFF800000,
    0x7F800001,
    0x7F80FFFF,
    0x7FBFFFFF,
    0x7FC00000,
    0x7FFF8000,
    0x7FFFFFFF,
    0xFF800001,
    0xFFFFFFFF,
]


@given(st.sampled_from(SPECIAL) | st.integers(0x7F800000, 0x7FFFFFFF) | st.integers(0xFF800000, 0xFFFFFFFF))
def test_what_is_not_finite_stays_so_at_every_width(pattern: int) -> None:
    """Every NaN and infinity, whatever its bits: rounded up, 0x7FFFFFFF would be -0.0, and nobody would see it."""
    value = np.array([pattern], dtype="<u4").view("<f4")
    for bits in (32, 16, 8):
        got = words.round_scalars(value, bits)
        assert np.isnan(got[0]) if np.isnan(value[0]) else got[0] == value[0]
    for bits in (32, 16, 8, 4):
        reader = words.Reader(words.pack_blocks(np.append(value, np.float32(1.0)), np.array([2]), bits))
        assert not np.isfinite(words.unpack_blocks(reader, np.array([2]), bits)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.sampled_from([1, 2]), st.integers(0, 2**32 - 1))
def test_odd_numbers_of_units_are_the_nearest_and_never_worse_than_signs(counts: list[int], bits: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_t(3, size=sum(counts)).astype(np.float32)
    packed = words.pack_blocks(values, np.array(counts), bits)
    assert len(packed) == 2 * len(counts) + -(-sum(counts) * bits // 8)
    got = words.unpack_blocks(words.Reader(packed), np.array(counts), bits)
    start = 0
    for count in counts:
        block, found = values[start : start + count].astype(np.float64), got[start : start + count]
        start += count
        if not count:
            continue
        unit = np.abs(found).min() if bits == 1 else np.abs(found)[np.abs(found).argmin()]
        assert set(np.round(np.abs(found) / unit, 3).tolist()) <= {1.0, 3.0}
        assert (np.sign(found) == np.sign(block)).all()

        def error(size: float, block: np.ndarray[tuple[int], np.dtype[np.float64]] = block) -> float:
            levels = size * (np.array([1.0]) if bits == 1 else np.array([1.0, 3.0]))
            return float(np.square(np.abs(np.abs(block)[:, None] - levels)).min(axis=1).sum())

        mine, slack = float(np.square(found - block).sum()), 0.02 * float(np.square(block).sum())  # the unit has 8 bits
        assert mine <= error(unit) + slack, "each is its nearest level"
        assert mine <= float(np.square(np.abs(block) - np.abs(block).mean()).sum()) + slack, "no worse than one bit"


@pytest.mark.parametrize(("bits", "expected"), [(1, 1 - 2 / np.pi), (2, 0.1188)])
def test_few_bits_leave_the_least_error_of_normal_numbers(bits: int, expected: float) -> None:
    """1 - 2/pi and, of the uniform quantisers with four levels, 0.1188 (Max, 1960, table II)."""
    values = np.random.default_rng(1).normal(size=200_000).astype(np.float32) * 1e-3
    counts = np.array([len(values)])
    got = words.unpack_blocks(words.Reader(words.pack_blocks(values, counts, bits)), counts, bits)
    assert float(np.square(got - values).sum() / np.square(values).sum()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits", [1, 2])
def test_few_bits_of_zeros_are_zeros_and_what_is_not_finite_stays_so(bits: int) -> None:
    counts = np.array([3, 2])
    values = np.array([0.0, 0.0, 0.0, 1.0, np.nan], dtype=np.float32)
    got = words.unpack_blocks(words.Reader(words.pack_blocks(values, counts, bits)), counts, bits)
    assert got[:3].tolist() == [0.0, 0.0, 0.0]
    assert not np.isfinite(got[3:]).all()
    with pytest.raises(MalformedMessageError, match="Padding"):
        words.unpack_blocks(words.Reader(words.pack_blocks(values, counts, bits)[:-1] + b"\xff"), counts, bits)
