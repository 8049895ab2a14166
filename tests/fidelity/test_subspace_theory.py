"""docs/subspace.md: what a step along a projected gradient gains, both methods' limits, and how many coordinates that takes.

On quadratic losses L(w) = (w - w*)^T H (w - w*) / 2, where every expectation is known; directions are those of the families.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from fedtune.directions import Pool
from fedtune.directions.base import F64
from fedtune.directions.oracle import dense
from fedtune.layout import Layout

D = 256
LAYOUT = Layout.from_shapes([("w", (D,))])
POOLS = 60


@cache
def spectrum(power: float) -> F64:
    """float64 [D]: eigenvalues of H, falling as 1/i^power, in a random order; their mean is 1."""
    values = np.arange(1.0, D + 1) ** -power
    return np.asarray(np.random.default_rng(7).permutation(values / values.mean()))


@cache
def bases(family: str, size: int) -> tuple[F64, ...]:
    """Z^T of several pools, float64 [size, D] each."""
    return tuple(dense(Pool(family, seed, size), LAYOUT) for seed in range(POOLS))


def gain_of_a_step(gradient: F64, curvature: F64, step: F64) -> float:
    return float(-gradient @ step - 0.5 * step @ (curvature * step))


def expected(gradient: F64, curvature: F64, size: int, rate: float) -> float:
    """rate K/d |g|^2 - rate^2/2 (a g^T H g + b tr H |g|^2): the gain of -rate P g, P a random projector of rank K = size."""
    beta = size * (D - size) / (D * (D + 2) * (D - 1))
    alpha = size * (size + 2) / (D * (D + 2)) - beta
    square = float(gradient @ gradient)
    bent = alpha * float(gradient @ (curvature * gradient)) + beta * float(curvature.sum()) * square
    return rate * size / D * square - 0.5 * rate**2 * bent


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("size", [8, 32, 128])
@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_the_gain_of_one_step_is_what_the_page_says(power: float, size: int, rate: float) -> None:
    curvature = spectrum(power)
    gradient = np.random.default_rng(3).normal(size=D)
    gains = []
    for rows in bases("gaussian", size):
        basis = np.linalg.qr(rows.T)[0]
        gains.append(gain_of_a_step(gradient, curvature, -rate * basis @ (basis.T @ gradient)))
    wanted = expected(gradient, curvature, size, rate)
    spread = np.std(gains) / np.sqrt(POOLS)
    assert abs(np.mean(gains) - wanted) < 4 * spread + 0.02 * abs(wanted)


@pytest.mark.parametrize("family", ["hadamard", "rademacher"])
def test_with_one_step_both_methods_are_the_same_at_their_best_rates(family: str) -> None:
    """Ferret rebuilds (1/K) Z Z^T of its step, the subspace moves along (1/d) Z Z^T of the gradient: one direction."""
    curvature, gradient = spectrum(1.0), np.random.default_rng(3).normal(size=D)
    for rows in bases(family, 32)[:5]:
        ferret, subspace = rows.T @ (rows @ -gradient) / 32, rows.T @ (rows @ -gradient) / D
        np.testing.assert_allclose(ferret, subspace * D / 32)
        best = [
            max(gain_of_a_step(gradient, curvature, rate * step) for rate in np.geomspace(1e-3, 1e2, 400))
            for step in (ferret, subspace)
        ]
        assert best[0] == pytest.approx(best[1], rel=1e-2)


def rounds_of(kind: str, size: int, rate: float, steps: int, rounds: int, noise: float) -> float:
    """The mean loss after some rounds of one client, relative to that before; a fresh pool each round."""
    curvature, random = spectrum(1.5), np.random.default_rng(5)
    losses = []
    for start in range(0, POOLS - rounds, rounds):
        w = np.ones(D)
        for rows in bases("rademacher", size)[start : start + rounds]:
            if kind == "ferret":
                end = w.copy()
                for _ in range(steps):
                    end -= rate * (curvature * end + noise * random.normal(size=D))
                w = w + rows.T @ (rows @ (end - w)) / size
            else:
                c = np.zeros(size)
                for _ in range(steps):
                    gradient = curvature * (w + rows.T @ c) + noise * random.normal(size=D)
                    c -= rate * (rows @ gradient) / D
                w = w + rows.T @ c
        losses.append(float(w @ (curvature * w)) / float(curvature.sum()))
    return float(np.mean(losses))


def test_with_many_steps_the_subspace_gains_more() -> None:
    """Each at the best of the same rates: steps in the subspace see what they do to the loss, a projection does not."""
    rates = np.geomspace(1e-4, 10.0, 26)
    with np.errstate(over="ignore", invalid="ignore"):
        best = {
            kind: min(found for rate in rates if np.isfinite(found := rounds_of(kind, 32, rate, 25, 4, 0.1)))
            for kind in ("ferret", "subspace")
        }
    assert best["subspace"] < 0.8 * best["ferret"] < 0.8


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_as_many_coordinates_as_the_effective_rank_gain_half_of_a_full_step(power: float) -> None:
    """K = r = tr H / (g^T H g / |g|^2), for a gradient as it comes from w - w* of equal parts; whatever d is."""
    curvature = spectrum(power)
    gradient = curvature * np.random.default_rng(9).choice([-1.0, 1.0], size=D)
    along = float(gradient @ (curvature * gradient)) / float(gradient @ gradient)
    rank = round(float(curvature.sum()) / along)
    full = float(gradient @ gradient) / (2 * along)
    size = min(rank, D)
    gains = [expected(gradient, curvature, size, rate) for rate in np.geomspace(1e-3, 1e3, 2000)]
    assert (0.4 if rank < D / 2 else 0.95) < max(gains) / full < (0.62 if rank < D / 2 else 1.05)
