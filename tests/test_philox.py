"""Philox4x32-10: the published known answers, and streams that do not depend on how they are read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import philox
from fedtune.directions.cpu.philox import SCRATCH, random_words

# Random123, tests/kat_vectors: "philox4x32 10 <counter> <key> <result>".
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_the_published_answers(counter: str, key: str, result: str) -> None:
    k0, k1 = hexadecimal(key)
    got = philox.philox4x32(np.array([hexadecimal(counter)], dtype=np.uint32), (k0, k1))
    assert got.dtype == np.uint32
    assert got.tolist() == [hexadecimal(result)]


@given(key=st.integers(0, 2**64 - 1), start=st.integers(0, 2**40), count=st.integers(0, 40), cut=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_a_stream_read_in_two_parts_is_the_stream(key: int, start: int, count: int, cut: int) -> None:
    cut = min(cut, count)
    parts = [philox.words(key, start, cut), philox.words(key, start + cut, count - cut)]
    assert np.array_equal(np.concatenate(parts), philox.words(key, start, count))


def test_block_numbers_go_on_above_32_bits() -> None:
    low = philox.words(9, 0, 4)
    assert not np.array_equal(philox.words(9, 4 * 2**32, 4), low)
    carried = philox.philox4x32(np.array([[0, 1, 0, 0]], dtype=np.uint32), (9, 0))
    assert np.array_equal(philox.words(9, 4 * 2**32, 4), carried[0])


@pytest.mark.parametrize("first", [0, 5, 2**32 - 3, 2**35 + 1])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_the_compiled_kernel_gives_the_same_words(first: int, count: int) -> None:
    counter = np.zeros((count, 4), dtype=np.uint32)
    blocks = np.arange(first, first + count, dtype=np.uint64)
    counter[:, 0], counter[:, 1] = blocks & np.uint64(philox.MASK32), blocks >> np.uint64(32)
    counter[:, 2], counter[:, 3] = 65535, 4
    scratch = np.empty(SCRATCH * count, dtype=np.uint32)
    got = random_words(scratch, first, count, 65535, 4, 0xFFFFFFFF, 0x12345678)
    assert np.array_equal(got, philox.philox4x32(counter, (0xFFFFFFFF, 0x12345678)).reshape(-1))
