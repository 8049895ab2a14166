"""Family hadamard: orthogonality, the column permutation, and tiles of every size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtune.directions import Directions, Pool
from fedtune.directions.counters import column_shifts, pool_key, tile_bits
from fedtune.directions.cpu.hadamard import columns_of
from fedtune.directions.cpu.transform import walsh_hadamard
from fedtune.directions.oracle import column, hadamard
from fedtune.layout import Layout

BITS = (12, 13, 14, 15, 16)


def tile_of(pool: Pool) -> np.ndarray:
    bits = tile_bits(pool.size)
    return np.array([*pool_key(pool), bits, *column_shifts(bits)], dtype=np.int64)


@pytest.mark.parametrize(("size", "bits"), [(1, 12), (4096, 12), (4097, 13), (8192, 13), (65536, 16)])
def test_a_tile_is_4096_or_the_next_power_of_two(size: int, bits: int) -> None:
    assert tile_bits(size) == bits


@pytest.mark.parametrize("bits", range(6, 17))
def test_the_transform_is_the_sum_over_walsh_functions(bits: int) -> None:
    n = 1 << bits
    x = np.random.default_rng(bits).integers(-9, 10, n).astype(np.float32)
    got = x.copy()
    walsh_hadamard(got)
    for i in (0, 1, 5, n // 2, n - 1):
        signs = [-1 if (i & c).bit_count() % 2 else 1 for c in range(n)]
        assert got[i] == x @ np.array(signs)


@pytest.mark.parametrize("size", [4096, 5000])
def test_directions_are_exactly_orthogonal_in_a_full_tile(size: int) -> None:
    n = 1 << tile_bits(size)
    directions = Directions(Layout.from_shapes([("a", (3 * n,))]), Pool("hadamard", 11, size))
    for k in (0, 1, size - 1):
        z = torch.zeros(3 * n)
        directions.add([z], k, 1.0)
        assert np.array_equal(directions.project([(0, z)])[0], 3.0 * n * (np.arange(size) == k))


@pytest.mark.parametrize("bits", BITS)
def test_columns_are_a_permutation_that_differs_from_tile_to_tile(bits: int) -> None:
    pool = Pool("hadamard", 5, 1 << bits)
    columns = np.empty((3, pool.size), np.uint16)
    for row, number in zip(columns, (0, 1, 2**33), strict=True):
        columns_of(row, 0, number, tile_of(pool), bits)
        assert np.array_equal(np.sort(row), np.arange(pool.size))
        assert [int(row[k]) for k in (0, 1, pool.size - 1)] == [column(pool, number, k) for k in (0, 1, pool.size - 1)]
    assert (columns[0] == columns[1]).mean() < 0.01
    assert (columns[0] == columns[2]).mean() < 0.01


@pytest.mark.parametrize("bits", BITS)
def test_pairs_of_columns_meet_in_short_tensors_as_rarely_as_chance(bits: int) -> None:
    """Two seeds coincide on the first 2^b positions of a tile if their columns agree in b low bits.

    Over tiles this must be as rare for every pair, above all for numbers that differ in few bits, as for random columns.
    """
    size, tiles = 1 << bits, 3000
    others = [1, 2, 64, size // 2, size // 4, 3 * size // 4, size - 1]
    tile = tile_of(Pool("hadamard", 1, size))
    row = np.empty(1, np.uint16)
    differences = np.empty((tiles, len(others)), np.uint32)
    for number in range(tiles):
        columns_of(row, 0, number, tile, bits)
        first = row[0]
        for which, other in enumerate(others):
            columns_of(row, other, number, tile, bits)
            differences[number, which] = first ^ row[0]
    for low in (1, 2, 4):
        expected = (2.0 ** (bits - low) - 1) / (size - 1)
        share = (differences % (1 << low) == 0).mean(axis=0)
        assert np.abs(share - expected).max() < 5.0 * np.sqrt(expected / tiles)
    bits_set = (differences[:, :, None] >> np.arange(bits) & 1).mean(axis=0)
    assert np.abs(bits_set - 0.5).max() < 5.0 * 0.5 / np.sqrt(tiles)


@pytest.mark.parametrize("size", [4097, 65536])
def test_large_tiles_agree_with_the_oracle(size: int) -> None:
    pool = Pool("hadamard", 2, size)
    layout = Layout.from_shapes([("a", (70_000,)), ("b", (33,))])
    directions = Directions(layout, pool)
    positions = np.concatenate([np.arange(0, 70_000, 701), np.arange(131_072, 131_105)])
    ks = [0, 4095, size - 1]
    picked = np.concatenate([np.arange(0, 70_000, 701), np.arange(70_000, 70_033)])
    coefficients = np.zeros((1, size), np.float32)
    coefficients[0, ks] = [0.5, -2.0, 0.25]
    out = [torch.zeros(70_000), torch.zeros(33)]
    directions.combine(out, out, coefficients)
    expected = sum(coefficients[0, k] * hadamard(pool, k, positions) for k in ks)
    assert np.array_equal(torch.cat(out).numpy()[picked], expected)


def test_full_pools_of_grid_coefficients_are_exact() -> None:
    """Invariant: +-1 directions and sums below 2^24 grid steps give the same bits in any order of summation."""
    rng = np.random.default_rng(0)
    coefficients = rng.integers(-4096, 4096, (1, 4096)).astype(np.float32) * np.float32(2**-20)
    out = torch.zeros(100)
    directions = Directions(Layout.from_shapes([("a", (100,))]), Pool("hadamard", 2, 4096))
    directions.combine([out], [out], coefficients)
    rows = np.empty((4096, 100))
    for k in range(4096):
        z = torch.zeros(100)
        directions.add([z], k, 1.0)
        rows[k] = z.numpy()
    assert np.array_equal(out.double().numpy(), coefficients[0].astype(np.float64) @ rows)
