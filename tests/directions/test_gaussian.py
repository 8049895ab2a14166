"""Family gaussian: accuracy against exact functions, distribution, tails, and the extreme words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtune.directions import Pool, make_family
from fedtune.directions.cpu.gaussian import normal_planes
from fedtune.directions.cpu.stretch import BLOCKS, begin, seed_words
from fedtune.layout import Layout
from fedtune.philox import MASK32, philox4x32

LAYOUT = Layout.from_shapes([("a", (1,))])


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    """float32 [2^21]: directions of four seeds over 2^19 positions each."""
    family, zero = make_family(Pool("gaussian", 8, 4), LAYOUT), np.zeros(1 << 19, np.float32)
    values = np.empty((4, 1 << 19), np.float32)
    for k, row in enumerate(values):
        family.add(row, zero, 12345, k, 1.0)
    return values.reshape(-1)


def pairs(radii: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The normals that words make: cosines and sines. Each half of a block must make the same of the same words."""
    count = -(-len(radii) // BLOCKS)
    words, planes = np.zeros((count, 4, BLOCKS), np.uint32), np.empty((count, 4, BLOCKS), np.float32)
    for m, values in enumerate((radii, turns, radii, turns)):
        padded = np.zeros(count * BLOCKS, np.uint32)
        padded[: len(values)] = values
        words[:, m] = padded.reshape(count, BLOCKS)
    for each, of in zip(planes, words, strict=True):
        normal_planes(each, of, BLOCKS)
    assert np.array_equal(planes[:, :2], planes[:, 2:])
    return planes[:, 0].reshape(-1)[: len(radii)], planes[:, 1].reshape(-1)[: len(radii)]


def exact(radii: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    radius = np.sqrt(-2.0 * np.log((radii + 0.5) / 2.0**32))
    angle = 2.0 * math.pi * turns / 2.0**32
    return radius, radius * np.cos(angle), radius * np.sin(angle)


def test_accuracy_against_exact_functions() -> None:
    rng = np.random.default_rng(3)
    radii, turns = rng.integers(0, 2**32, (2, 1 << 18), dtype=np.uint32)
    cosines, sines = pairs(radii, turns)
    radius, cosine, sine = exact(radii, turns)
    error = np.maximum(np.abs(cosines - cosine), np.abs(sines - sine))
    assert error[radius > 0.05].max() < 1e-6
    assert error.max() < 3e-4
    assert (radius > 0.05).mean() > 0.998


def test_the_extreme_words_give_finite_values() -> None:
    edges = [0, 1, 2, 2**24 - 1, 2**24, 2**24 + 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    eighths = [i * 2**29 + d for i in range(8) for d in (0, 1)] + [i * 2**29 - 1 for i in range(1, 9)]
    radii, turns = (a.reshape(-1).astype(np.uint32) for a in np.meshgrid(edges, eighths))
    cosines, sines = pairs(radii, turns)
    _, cosine, sine = exact(radii, turns)
    assert np.isfinite([cosines, sines]).all()
    assert np.abs(cosines - cosine).max() < 3e-4
    assert np.abs(sines - sine).max() < 3e-4
    assert max(cosines.max(), sines.max()) == pytest.approx(math.sqrt(2 * math.log(2**33)), rel=1e-6)


@pytest.mark.parametrize("first", [0, 5, 2**32 - BLOCKS, 2**35 + 1])
@pytest.mark.parametrize("k", [0, 65535])
def test_the_words_of_a_stretch_are_those_of_philox(first: int, k: int) -> None:
    key = np.array([0xFFFFFFFF, 0x12345678])
    tables, words = np.empty((2, BLOCKS), np.uint64), np.empty((4, BLOCKS), np.uint32)
    begin(tables, first, BLOCKS, 6, key)
    seed_words(words, tables, first, BLOCKS, k, key)
    blocks = np.arange(first, first + BLOCKS)
    counters = np.stack([blocks & MASK32, blocks >> 32, np.full(BLOCKS, k), np.full(BLOCKS, 6)], axis=1)
    assert np.array_equal(words.T, philox4x32(counters.astype(np.uint32), (0xFFFFFFFF, 0x12345678)))


def test_moments(sample: np.ndarray) -> None:
    z, n = sample.astype(np.float64), len(sample)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((z**power).mean() - moment) < 4.5 * math.sqrt(variance / n)


def test_the_distribution_is_normal(sample: np.ndarray) -> None:
    """Kolmogorov-Smirnov on 2^17 values; the bound has p = 1e-4."""
    z = np.sort(sample[:: 1 << 4].astype(np.float64))
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in z])
    n = len(z)
    distance = max((np.arange(1, n + 1) / n - cdf).max(), (cdf - np.arange(n) / n).max())
    assert distance < 2.225 / math.sqrt(n)


@pytest.mark.parametrize("threshold", [2.0, 3.0, 4.0])
def test_tails_hold_their_share(sample: np.ndarray, threshold: float) -> None:
    expected = len(sample) * 0.5 * math.erfc(threshold / math.sqrt(2.0))
    for count in ((sample > threshold).sum(), (sample < -threshold).sum()):
        assert abs(count - expected) < 4.5 * math.sqrt(expected)


def test_neighbours_and_seeds_are_uncorrelated(sample: np.ndarray) -> None:
    rows = sample.reshape(4, -1).astype(np.float64)
    bound = 4.5 / math.sqrt(rows.shape[1])
    for lag in (1, 2, 3, 4):
        for values in (rows, rows**2 - 1.0):
            assert np.abs((values[:, lag:] * values[:, :-lag]).mean(axis=1)).max() < bound * (1 if values is rows else 2)
    gram = rows @ rows.T / rows.shape[1]
    assert np.abs(gram - np.diag(np.diag(gram))).max() < bound
