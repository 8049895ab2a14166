"""Named streams: the same numbers for ever (known answers), different names differ, and draws follow their laws."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.seeds import Stream, stream_key


def test_known_answers() -> None:
    """Two sides of a federation, and a run resumed years later, derive these without sending them."""
    assert stream_key(7, "sample", 1) == 0xB19BC12147FBC6DD
    stream = Stream(7, "sample", 1)
    assert stream.words(3).tolist() == [2370259326, 878947729, 1434209701]
    assert stream.below(10, 5).tolist() == [7, 8, 2, 0, 0]
    assert stream.permutation(6).tolist() == [2, 4, 5, 3, 0, 1]
    assert stream.weighted(np.array([2, 0, 3]), 6).tolist() == [2, 2, 0, 2, 0, 2]
    assert stream.uniform(1).tolist() == [0.8924925134401749]


def test_the_key_is_the_hash_of_an_unambiguous_spelling() -> None:
    spelled = b"i1:7;s6:sample;i2:12;"
    assert stream_key(7, "sample", 12) == int.from_bytes(hashlib.sha256(spelled).digest()[:8], "little")


@pytest.mark.parametrize(
    ("one", "other"),
    [((1, 23), (12, 3)), (("a", "b"), ("ab",)), ((1,), ("1",)), ((1, "x"), ("x", 1)), (("s1:a;",), ("a",)), ((), (0,))],
)
def test_names_that_look_alike_differ(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert stream_key(*one) != stream_key(*other)


def test_a_stream_goes_on_where_it_stopped() -> None:
    whole, parts = Stream(3, "x"), Stream(3, "x")
    expected = whole.words(64)
    assert np.array_equal(np.concatenate([parts.words(n) for n in (1, 2, 5, 0, 56)]), expected)


@pytest.mark.parametrize("bound", [1, 2, 3, 1000, 2**32 - 1, 2**32, 2**32 + 1, 10**11, 2**40, 2**56])
def test_below_is_the_high_part_of_the_product_with_the_word(bound: int) -> None:
    words = Stream("b", bound).words64(50)
    drawn = Stream("b", bound).below(bound, 50)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == [int(word) * bound >> 64 for word in words]
    assert 0 <= drawn.min() <= drawn.max() < bound


@pytest.mark.parametrize("bound", [0, -1, 2**56 + 1])
def test_below_refuses_other_bounds(bound: int) -> None:
    with pytest.raises(ValueError, match=r"bound must be in 1 \.\. 2\^56, not"):
        Stream("b").below(bound, 1)


def test_below_and_uniform_are_uniform() -> None:
    counts = np.bincount(Stream("u").below(10, 100_000), minlength=10)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 35.6  # chi-square, 9 degrees of freedom, p < 5e-5
    u = np.sort(Stream("v").uniform(100_000))
    assert u[0] >= 0.0
    assert u[-1] < 1.0
    assert np.abs(u - np.arange(100_000) / 100_000).max() < 2.2 / np.sqrt(100_000)  # Kolmogorov-Smirnov, p < 1.3e-4


@given(count=st.integers(0, 60), share=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=50, deadline=None)
def test_permutations_and_subsets_are_what_they_say(count: int, share: float, seed: int) -> None:
    assert np.array_equal(np.sort(Stream(seed).permutation(count)), np.arange(count))
    subset = Stream(seed).subset(count, int(share * count))
    assert len(subset) == int(share * count)
    assert np.array_equal(subset, np.unique(subset))
    assert set(subset.tolist()) <= set(range(count))


def test_every_permutation_of_four_is_equally_likely() -> None:
    stream = Stream("p")
    codes = [int("".join(map(str, stream.permutation(4)))) for _ in range(3000)]
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 125) ** 2 / 125).sum() < 60.0  # chi-square, 23 degrees of freedom, p < 5e-5


def test_a_subset_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot take 5 of 4"):
        Stream("s").subset(4, 5)


def test_weighted_draws_follow_the_weights() -> None:
    drawn = Stream("w").weighted(np.array([1, 0, 2, 5]), 40_000)
    counts = np.bincount(drawn, minlength=4)
    assert counts[1] == 0
    expected = np.array([5_000, 10_000, 25_000])
    assert ((counts[[0, 2, 3]] - expected) ** 2 / expected).sum() < 19.8  # chi-square, 2 degrees of freedom, p < 5e-5


def test_weighted_subsets_are_drawn_one_after_another() -> None:
    stream, weights = Stream("ws"), np.array([1, 2, 3, 0])
    subsets = [tuple(stream.weighted_subset(weights, 2).tolist()) for _ in range(2000)]
    exact = {
        (0, 1): 1 / 6 * 2 / 5 + 2 / 6 * 1 / 4,
        (0, 2): 1 / 6 * 3 / 5 + 3 / 6 * 1 / 3,
        (1, 2): 2 / 6 * 3 / 4 + 3 / 6 * 2 / 3,
    }
    assert set(subsets) == set(exact)
    for subset, probability in exact.items():
        assert subsets.count(subset) / 2000 == pytest.approx(probability, abs=0.047)  # more than 4 standard errors


def test_normal_gamma_and_dirichlet_have_their_moments() -> None:
    z = Stream("n").normal(100_000)
    assert abs(z.mean()) < 0.013
    assert z.var() == pytest.approx(1.0, abs=0.018)
    assert (z**4).mean() == pytest.approx(3.0, abs=0.13)
    for shape in (0.3, 2.5):
        g = Stream("g", str(shape)).gamma(shape, 100_000)
        assert g.min() > 0.0
        assert g.mean() == pytest.approx(shape, abs=4 * np.sqrt(shape / 100_000))  # the variance is the shape as well
        assert g.var() == pytest.approx(shape, rel=0.05)
    shares = Stream("d").dirichlet(0.5, 8)
    assert shares.min() >= 0.0
    assert shares.sum() == pytest.approx(1.0, abs=1e-12)
