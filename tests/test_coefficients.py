"""The grid: rounding is bounded, sums are exact in float32, digests name the model and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.coefficients import EXACT_SUM, Coefficients, PoolCoefficients, quantise, summable
from fedtune.directions.base import Pool
from fedtune.errors import NonFiniteError

POOL, AXES = Pool("hadamard", 1, 64), Pool("axes", 0, 64)
BASE = b"b" * 16


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 24), st.floats(1e-20, 1e20), st.integers(0, 2**32 - 1))
def test_rounding_is_at_most_half_a_step_and_sums_stay_exact(bits: int, scale: float, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((3, 64)) * scale
    values[1] = 0.0
    grid = quantise(POOL, values, bits)
    step = np.ldexp(1.0, grid.exponents)[:, None]
    cut_off = np.abs(values) > (2 ** (bits - 1) - 0.5) * step  # of a coarse grid only, and sent as its largest number
    assert np.all((np.abs(grid.values.astype(np.float64) - values) <= step / 2) | cut_off)
    assert bits < 8 or not cut_off.any()
    assert np.abs(grid.q).max() <= 2 ** (bits - 1) - 1
    assert np.abs(grid.q.astype(np.int64)).sum(axis=1).max() <= EXACT_SUM
    assert (grid.exponents[1], grid.q[1].any()) == (0, False)


@given(st.integers(8, 24))
def test_the_grid_is_the_finest_one(bits: int) -> None:
    values = np.full((1, 64), 1.0)
    values[0, 0] = 0.3
    grid = quantise(POOL, values, bits)
    finer = np.rint(np.ldexp(values, -(int(grid.exponents[0]) - 1)))
    assert np.abs(finer).max() > 2 ** (bits - 1) - 1 or np.abs(finer).sum() > EXACT_SUM


def test_values_on_the_grid_do_not_move() -> None:
    values = np.ldexp(np.arange(-32, 32, dtype=np.float64)[None, :], -13)
    assert quantise(POOL, values, 8).values.tolist() == values.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_what_is_not_finite_never_becomes_a_coefficient(bad: float) -> None:
    values = np.zeros((1, 64))
    values[0, 3] = bad
    with pytest.raises(NonFiniteError, match="Lower lr"):
        quantise(POOL, values, 8)


@pytest.mark.parametrize(("pool", "largest"), [(POOL, 100), (AXES, 92)], ids=["sums", "no sums"])
def test_exponents_go_to_the_ends_of_their_range_and_not_beyond(pool: Pool, largest: int) -> None:
    """-120 .. 100, and 8 less where coefficients of 32 bits are not summed: 2^31 2^92 is a float32, 2^31 2^100 is none."""

    def one(value: float) -> PoolCoefficients:
        return quantise(pool, np.pad([[value]], ((0, 0), (0, 63))), 8)

    high, low = one(127 * 2.0**largest), one(2.0**-120)
    assert (high.q[0, 0], high.exponents.tolist()) == (127, [largest])
    assert (low.q[0, 0], low.exponents.tolist()) == (1, [-120])
    assert (one(2.0**-122).is_zero, one(2.0**-122).exponents.tolist()) == (True, [0])
    with pytest.raises(NonFiniteError, match="too large for float32"):
        one(127 * 2.0 ** (largest + 1))


def test_a_sum_of_two_to_the_24_is_exact_and_one_more_is_not() -> None:
    q = np.full((2, 64), 2**18, np.int32)
    assert summable(POOL, q, np.full(2, 100, np.int32))
    q[1, 5] -= 2**19 + 1  # a block counts alone, and its numbers without their signs
    assert not summable(POOL, q, np.zeros(2, np.int32))


def test_what_has_no_sums_is_bounded_by_its_exponent_where_it_is_not_zero() -> None:
    q = np.zeros((2, 64), np.int32)
    q[0] = 2**31 - 1
    assert summable(AXES, q, np.array([92, 100], np.int32))
    assert not summable(AXES, q, np.array([93, 0], np.int32))


def test_a_digest_names_base_pool_and_coefficients() -> None:
    def digest(pool: Pool = POOL, first: int = 1, exponent: int = 0, base: bytes = BASE) -> bytes:
        q = np.zeros((1, 64), dtype=np.int32)
        q[0, 0] = first
        return Coefficients((PoolCoefficients(pool, q, np.array([exponent], np.int32)),)).digest(base)

    pools = [digest(Pool("hadamard", 2, 64)), digest(Pool("gaussian", 1, 64))]
    others = [*pools, digest(first=2), digest(exponent=1), digest(base=b"c" * 16)]
    assert digest() not in others
    assert len(set(others)) == len(others)
    assert digest() == digest()


def test_a_pool_of_zeros_does_not_change_the_digest() -> None:
    zero = quantise(POOL, np.zeros((1, 64)), 8)
    one = quantise(Pool("hadamard", 9, 64), np.ones((1, 64)), 8)
    assert Coefficients((zero, one, zero)).digest(BASE) == Coefficients((one,)).digest(BASE)
    assert Coefficients(()).digest(BASE) == Coefficients((zero,)).digest(BASE)
    assert PoolCoefficients.zero(POOL, 1).identity == zero.identity


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("outlier", [1.0, 20.0])
def test_a_coarse_grid_is_the_one_with_the_least_error(bits: int, outlier: float) -> None:
    """Against every power of two by brute force; one large coefficient does not make all others zero."""
    row = np.append(np.random.default_rng(5).normal(size=1023), outlier)
    found = quantise(Pool("hadamard", 0, 1024), row[None], bits)
    limit = 2 ** (bits - 1) - 1

    def error(exponent: int) -> float:
        return float(np.square(np.clip(np.rint(np.ldexp(row, -exponent)), -limit, limit) * 2.0**exponent - row).sum())

    least = min(error(exponent) for exponent in range(-12, 8))
    assert float(np.square(found.values[0].astype(np.float64) - row).sum()) == pytest.approx(least, rel=1e-6)
    assert (found.q != 0).mean() > 0.2


def test_of_two_coarse_grids_with_the_same_error_the_coarser_is_taken() -> None:
    """2 bits, |q| <= 1, of 1 and 1/2: at 1 the half is lost, at 1/2 half of the one, a squared error of 1/4 each."""
    found = quantise(POOL, np.pad([[1.0, 0.5]], ((0, 0), (0, 62))), 2)
    assert (found.exponents.tolist(), found.q[0, :2].tolist()) == ([0], [1, 0])
