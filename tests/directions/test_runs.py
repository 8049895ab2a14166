"""The kernels of the CPU on runs of every awkward length and start, against the oracle's rows.

Lengths and starts stand around the numbers that a kernel cuts at: a sign word, a Philox block of signs, a stretch, a tile.
"""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.directions import Pool, make_family
from fedtune.directions.base import F64, Family
from fedtune.directions.families import FAMILIES
from fedtune.directions.oracle import dense
from fedtune.layout import Layout

K = 5
END = 5 * 4096
LAYOUT = Layout.from_shapes([("a", (END,))])
LENGTHS = (1, 31, 32, 127, 128, 129, 1023, 1025, 4095, 4096, 4097, 8191, 12288)
STARTS = (0, 1, 33, 130, 1021, 4000, 4095, 4096)
VALUE_ERROR = {"hadamard": 0.0, "rademacher": 0.0, "gaussian": 3e-6}
GRID = np.array([3.0, -1.0, 0.0, 0.5, -2.25], np.float32)


@pytest.fixture(scope="module", params=VALUE_ERROR)
def case(request: pytest.FixtureRequest) -> tuple[Family, F64]:
    """A family and its directions at the positions 0 .. END - 1, float64 [K, END]."""
    pool = Pool(request.param, 77, K)
    return make_family(pool, LAYOUT), dense(pool, LAYOUT)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_run_has_the_oracles_values_and_nothing_beside_it_is_touched(
    case: tuple[Family, F64], length: int, start: int
) -> None:
    family, rows = case
    z, error = rows[:, start : start + length], VALUE_ERROR[family.name]
    base = np.zeros(length + 2, np.float32)
    for in_place in (True, False):
        out = base.copy()
        run = out[1:-1]
        family.add(run, run if in_place else base[1:-1], start, K - 1, 1.0)
        assert np.abs(run - z[K - 1]).max() <= error
        assert out[0] == out[-1] == 0.0
        out[:] = 0.0
        family.combine(run, run if in_place else base[1:-1], start, GRID)
        assert np.abs(run - GRID.astype(np.float64) @ z).max() <= 5 * error
        assert out[0] == out[-1] == 0.0
    delta = np.random.default_rng(length).integers(-8, 9, length).astype(np.float32)
    sums = np.ones(K)
    family.project(sums, delta, start, None)
    assert np.abs(sums - 1.0 - z @ delta).max() <= error * 10 * length**0.75  # exact for signs: whole numbers


@pytest.mark.parametrize("name", VALUE_ERROR)
def test_repeated_projections_of_real_numbers_have_the_same_bits(name: str) -> None:
    family = make_family(Pool(name, 77, K), LAYOUT)
    delta = np.random.default_rng(0).standard_normal(9001).astype(np.float32)
    results = []
    for shift in (0, 1, 3):  # of the array in memory, not of the positions
        moved = np.zeros(9001 + shift, np.float32)[shift:]
        moved[:] = delta
        sums = np.zeros(K)
        family.project(sums, moved, 37, None)
        results.append(sums)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@pytest.mark.parametrize("size", [100, 4095, 4096, 4097, 20_000, 65536])
def test_a_full_tile_gives_the_coefficients_back(size: int) -> None:
    """In a full tile the directions are orthogonal, and with few whole coefficients every sum is exact."""
    pool = Pool("hadamard", 9, size)
    family = FAMILIES["hadamard"](pool, LAYOUT)
    n = 1 << max(12, (size - 1).bit_length())
    coefficients = np.random.default_rng(size).integers(-1, 2, size).astype(np.float32)
    coefficients[size // 8 : -1] = 0.0
    coefficients[-1] = 1.0
    weights = np.zeros(2 * n, np.float32)
    family.combine(weights, weights, n, coefficients)
    sums = np.zeros(size)
    family.project(sums, weights, n, None)
    assert np.array_equal(sums, 2.0 * n * coefficients)
    family.add(weights, weights, n, size - 1, -1.0)
    coefficients[-1] = 0.0
    again = np.zeros_like(weights)
    family.combine(again, again, n, coefficients)
    assert np.array_equal(weights, again)


@pytest.mark.parametrize("size", [1, 4096, 5000])
def test_part_of_a_tile_is_that_part_of_the_whole_tile(size: int) -> None:
    family = FAMILIES["hadamard"](Pool("hadamard", 9, size), LAYOUT)
    coefficients = np.random.default_rng(1).integers(-9, 10, size).astype(np.float32)
    whole = np.zeros(8192, np.float32)
    family.combine(whole, whole, 0, coefficients)
    for start, end in ((0, 1), (0, 64), (63, 65), (0, 129), (100, 2048), (2047, 2050), (5, 4096), (4097, 4160)):
        part = np.zeros(end - start, np.float32)
        family.combine(part, part, start, coefficients)
        assert np.array_equal(part, whole[start:end])
