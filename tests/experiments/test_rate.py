"""The recommended learning rate against an exact oracle: a quadratic whose gradient, Hessian and batch noise are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from fedtune.errors import SweepError
from fedtune.experiments.rate import Rate, rate, steps_to_move
from fedtune.experiments.slopes import measure

WEIGHTS = 40
HESSIAN = np.diag(np.linspace(0.5, 2.0, WEIGHTS))
GRADIENT = np.linspace(-1.0, 1.0, WEIGHTS)
NOISE = 0.7  # standard deviation of each element of a batch's gradient


class Quadratic:
    """L_b(w0 + v) = 3 + <grad + noise_b, v> + <v, H v> / 2 along directions of +1 and -1."""

    def __init__(self, directions: int, batches: int, seed: int = 0, noise: float = NOISE) -> None:
        random = np.random.default_rng(seed)
        self.z = random.choice([-1.0, 1.0], size=(directions, WEIGHTS))
        self.noise = noise * random.standard_normal((directions, batches, WEIGHTS))

    def loss(self, d: int, b: int, v: np.ndarray) -> float:
        return float(3.0 + (GRADIENT + self.noise[d, b]) @ v + 0.5 * v @ HESSIAN @ v)

    def at(self, d: int, b: int, offsets: Sequence[float]) -> list[float]:
        return [self.loss(d, b, c * self.z[d]) for c in offsets]


def found(directions: int, batches: int, *, per_step: int = 1, clients: int = 1, shared: bool = False, seed: int = 0) -> Rate:
    oracle = Quadratic(directions, batches, seed)
    slopes = measure(oracle.at, directions=directions, batches=batches, eps=1e-3, rounding=1e-15)
    return rate(slopes.slopes, slopes.curvatures, per_step=per_step, clients=clients, shared=shared)


S = float(GRADIENT @ GRADIENT)
Q = S + WEIGHTS * NOISE**2
C = float(np.trace(HESSIAN))


def test_signal_square_curvature_and_rate_are_those_of_the_quadratic() -> None:
    rate_ = found(1500, 4)
    for measured, exact in ((rate_.signal, S), (rate_.square, Q), (rate_.curvature, C), (rate_.step, S / (Q * C))):
        assert measured.value == pytest.approx(exact, rel=0.08)
        assert abs(measured.value - exact) <= 4.0 * measured.error + 1e-6 * exact
    assert rate_.seen
    assert rate_.largest == 2.0 * rate_.step.value


def test_the_error_is_the_spread_over_repetitions() -> None:
    rates = [found(16, 3, seed=seed) for seed in range(150)]
    spread = float(np.std([one.signal.value for one in rates]))
    assert float(np.mean([one.signal.error for one in rates])) == pytest.approx(spread, rel=0.3)


def mean_change(learning_rate: float, per_step: int = 1, clients: int = 1, shared: bool = False, repeats: int = 20000) -> float:
    """The change of the expected loss by steps of `clients` clients from w0, averaged; a Monte Carlo of the real update."""
    random = np.random.default_rng(3)
    move = np.zeros((repeats, WEIGHTS))
    same = signs(random, repeats, per_step)
    for _ in range(clients):
        z = same if shared else signs(random, repeats, per_step)
        batch = GRADIENT + NOISE * random.standard_normal((repeats, WEIGHTS))
        slopes = np.einsum("rpw,rw->rp", z, batch)
        move -= learning_rate / per_step / clients * np.einsum("rp,rpw->rw", slopes, z)
    return float(np.mean(move @ GRADIENT + 0.5 * np.einsum("rw,wv,rv->r", move, HESSIAN, move, optimize=True)))


def signs(random: np.random.Generator, repeats: int, per_step: int) -> np.ndarray:
    """Directions of +1 and -1: [repeats, P, weights]."""
    return random.choice([-1.0, 1.0], size=(repeats, per_step, WEIGHTS))


@pytest.mark.parametrize(("per_step", "clients", "shared"), [(1, 1, False), (2, 1, False), (1, 3, False), (1, 3, True)])
def test_real_steps_gain_most_near_the_rate_and_nothing_at_twice_the_rate(per_step: int, clients: int, shared: bool) -> None:
    best = found(1500, 4, per_step=per_step, clients=clients, shared=shared).averaged.value
    gain = -mean_change(best, per_step, clients, shared)
    assert gain == pytest.approx(S * best / 2.0, rel=0.25)  # what is left out is 1 / (effective rank) each
    for factor in (0.5, 1.6):
        assert -mean_change(factor * best, per_step, clients, shared) < gain
    assert abs(mean_change(2.0 * best, per_step, clients, shared)) < 0.7 * gain  # at 2.5 times it is a loss of 1.25 gains
    assert mean_change(2.5 * best, per_step, clients, shared) > 0.5 * gain


def test_no_signal_is_said_to_be_none_and_bounded() -> None:
    random = np.random.default_rng(0)
    rate_ = rate(random.standard_normal((32, 8)), np.full(32, 5.0), per_step=1, clients=1, shared=False)
    assert not rate_.seen
    assert 0.0 < rate_.ceiling < 2.0 * 3.0 / math.sqrt(32) / 5.0


def test_a_flat_loss_bounds_nothing() -> None:
    rate_ = rate(np.ones((8, 2)), np.zeros(8), per_step=1, clients=1, shared=False)
    assert (rate_.bends, rate_.seen) == (False, False)


def test_steps_until_the_weights_have_moved() -> None:
    rate_ = rate(np.full((4, 2), 2.0), np.ones(4), per_step=1, clients=1, shared=False)
    steps = steps_to_move(0.01, learning_rate=0.1, rate=rate_, norm=50.0, weights=100, per_step=1)
    assert steps == pytest.approx((0.5 / 0.2 / 10.0) ** 2)


def test_second_differences_are_taken_wide_enough_to_be_above_rounding() -> None:
    rounded = 1e-3  # of the loss, absolutely

    class Coarse(Quadratic):
        def loss(self, d: int, b: int, v: np.ndarray) -> float:
            return round(super().loss(d, b, v) / rounded) * rounded

    coarse = Coarse(32, 2)
    slopes = measure(coarse.at, directions=32, batches=2, eps=1e-3, rounding=rounded / 3.0)
    assert slopes.distance > 1e-2
    assert slopes.curvatures.mean() == pytest.approx(C, rel=0.05)
    fine = Quadratic(32, 2)
    assert measure(fine.at, directions=32, batches=2, eps=1e-3, rounding=1e-15).distance == pytest.approx(1e-2)


def test_too_few_and_not_finite_are_refused() -> None:
    with pytest.raises(SweepError, match="2 directions and 2 batches"):
        measure(Quadratic(2, 2).at, directions=1, batches=2, eps=1e-3, rounding=1e-7)
    with pytest.raises(SweepError, match="not finite"):
        measure(lambda d, b, offsets: [math.nan for _ in offsets], directions=2, batches=2, eps=1e-3, rounding=1e-7)
