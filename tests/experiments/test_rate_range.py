"""The range test's search and verdicts, on losses that are known: a parabola in the rate, cliffs, and noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fedtune.experiments.rate_range import MOST_RATES, Found, Tried, place_of, rate_at, search


def bowl(best: float, *, cliff: float = 30.0, noise: float = 0.0, rounds: int = 3) -> Callable[[float], Tried]:
    """Gains g(lr) = -(2 x - x^2), x = lr / best: most at `best`, none at twice of it; diverges from `cliff` x best on."""

    def at(rate: float) -> Tried:
        x = rate / best
        if x >= cliff:
            return Tried(rate, (math.inf,))
        own = np.random.default_rng(7).standard_normal(rounds)  # common to all rates, in part: a round is good or bad for all
        return Tried(rate, tuple(-(2 * x - x * x) + noise * x * float(one) for one in own))

    return at


@pytest.mark.parametrize("best", [1e-4, 3e-3, 1.0])
@pytest.mark.parametrize("start", [1e-6, 1e-3, 5e-2, 30.0])
def test_the_best_rate_is_found_from_any_start(best: float, start: float) -> None:
    found = search(bowl(best), start)
    assert found.best.rate == best
    assert len(found.tried) <= MOST_RATES
    assert not found.at_the_end
    assert found.best.gains
    rates = [one.rate for one in found.tried]
    assert rates == sorted(rates)
    assert {best, rate_at(place_of(best) + 1), rate_at(place_of(best) - 1)} <= set(rates), "both neighbours were tried"


def test_no_rate_is_tried_twice() -> None:
    seen: list[float] = []

    def at(rate: float) -> Tried:
        seen.append(rate)
        return bowl(1e-2)(rate)

    search(at, 1e-4)
    assert len(seen) == len(set(seen))


def test_a_cliff_above_the_best_is_named() -> None:
    found = search(bowl(1e-2, cliff=3.0), 1e-2)
    assert (found.best.rate, found.harmful) == (1e-2, 3e-2)
    assert found.tried[-1].diverged
    assert search(bowl(1e-2, cliff=0.5), 1e-2).best.rate == 3e-3, "where the best itself is beyond the cliff"


def test_rates_that_gain_nearly_as_much_are_careful_choices() -> None:
    at = {1e-3: -0.5, 3e-3: -0.95, 1e-2: -1.0, 3e-2: -0.2}
    found = Found(tuple(Tried(rate, (change, change)) for rate, change in at.items()))
    assert (found.best.rate, found.careful.rate) == (1e-2, 3e-3)
    cliff = Found((*found.tried[:3], Tried(3e-2, (math.inf,))))
    assert (cliff.best.rate, cliff.careful.rate) == (1e-2, 3e-3), "a tenth of what diverged"
    near = Found((Tried(3e-3, (-0.1, -0.1)), Tried(1e-2, (-1.0, -1.0)), Tried(3e-2, (0.5, 0.5))))
    assert (near.best.rate, near.careful.rate) == (1e-2, 3e-3)
    assert Found(near.tried[1:]).careful.rate == 1e-2, "nothing lower was tried"
    worse = Found((Tried(1e-3, (0.1, 0.1)), Tried(1e-2, (0.2, 0.2))))
    assert worse.careful == worse.best == worse.tried[0]
    assert not worse.best.gains


def test_what_the_noise_does_not_tell_apart_is_said() -> None:
    """Differences are taken round by round: a round that is good for both rates says nothing of which is better."""
    best = Tried(1e-2, (-1.0, -0.2, -0.6))
    same, lower = Tried(3e-3, (-0.9, -0.3, -0.55)), Tried(1e-3, (-0.8, 0.0, -0.4))
    found = Found((lower, same, best))
    assert found.as_good == (3e-3, 1e-2)
    assert not lower.as_good_as(best)
    assert not Tried(1.0, (math.inf,)).as_good_as(best)


def test_noise_is_rarely_a_gain() -> None:
    """A rate that does nothing: the mean of four or more rounds is below two standard errors in one case of fourteen."""
    random = np.random.default_rng(2)
    for rounds in (4, 8):
        gains = [Tried(1.0, tuple(random.standard_normal(rounds))).gains for _ in range(1000)]
        assert np.mean(gains) < 0.09


def test_one_round_says_nothing_of_its_noise() -> None:
    one = Tried(1e-3, (-5.0,))
    assert one.error == math.inf
    assert not one.gains
