"""A learning rate by a range test: rounds from the base model at rates a factor apart, and which of them gains most.

The rates are 1, 3, 10, 30 ... times a power of ten. The search begins next to the rate that is set, goes up in steps of ten as
long as a round gains more (or nothing is to be seen yet), else down, and then tries the two neighbours of the best. All rates
see the same clients, batches and directions, so that differences between them have less noise than the changes themselves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ENOUGH = 2.0
"""Standard errors that a change, or a difference of two, must have to be told from noise: errors are of few rounds."""
MOST_OF_IT = 0.85
"""Share of the largest gain that a lower rate has to have to be recommended: what is best for one round is much for many."""
MARGIN = 2  # places: a tenth of a rate that harms one round, since that next to it harms several
MOST_RATES = 14
DECADE, NEXT = 2, 1  # steps of the search, in places of the scale


@dataclass(frozen=True)
class Tried:
    """A rate and what its rounds did: the change of the loss in nats a token, round by round; infinite where the loss
    blew up, and no round follows then.
    """

    rate: float
    changes: tuple[float, ...]

    @property
    def diverged(self) -> bool:
        """Whether a round blew the loss up."""
        return not all(map(math.isfinite, self.changes))

    @property
    def mean(self) -> float:
        """Of the changes; infinite if it diverged."""
        return math.inf if self.diverged else statistics.fmean(self.changes)

    @property
    def error(self) -> float:
        """Standard error of the mean over the rounds; infinite with one, or if it diverged."""
        return _error(self.changes) if not self.diverged else math.inf

    @property
    def gains(self) -> bool:
        """Whether the loss falls, beyond the noise."""
        return self.mean < -ENOUGH * self.error

    @property
    def seen(self) -> bool:
        """Whether the change is beyond the noise, in either direction."""
        return self.diverged or abs(self.mean) > ENOUGH * self.error

    def as_good_as(self, best: Tried) -> bool:
        """Whether the difference to `best`, round by round, is within its noise."""
        if self.diverged or best.diverged:
            return False
        differences = [own - other for own, other in zip(self.changes, best.changes, strict=True)]
        return statistics.fmean(differences) <= ENOUGH * _error(differences)


@dataclass(frozen=True)
class Found:
    """All rates that were tried, rising."""

    tried: tuple[Tried, ...]

    @property
    def best(self) -> Tried:
        """Where the loss fell most."""
        return min(self.tried, key=_worth)

    @property
    def careful(self) -> Tried:
        """The rate to run with: of those MARGIN places below the harmful ones the lowest with MOST_OF_IT of their largest gain.

        The best where none of them gains.
        """
        limit = place_of(self.harmful) - MARGIN if self.harmful else math.inf
        safe = [one for one in self.tried if place_of(one.rate) <= limit and one.mean < 0.0] or [self.best]
        most = min(safe, key=_worth)
        return next(one for one in safe if one is most or one.mean <= MOST_OF_IT * most.mean)

    @property
    def as_good(self) -> tuple[float, float]:
        """The lowest and the highest rate around the best that the noise does not tell from it."""
        best = self.tried.index(self.best)
        low = high = best
        while low and self.tried[low - 1].as_good_as(self.best):
            low -= 1
        while high + 1 < len(self.tried) and self.tried[high + 1].as_good_as(self.best):
            high += 1
        return self.tried[low].rate, self.tried[high].rate

    @property
    def harmful(self) -> float | None:
        """The lowest rate above the best at which a round makes things worse or diverges; None: none was tried."""
        above = self.tried[self.tried.index(self.best) + 1 :]
        return next((one.rate for one in above if one.mean > 0.0), None)

    @property
    def at_the_end(self) -> bool:
        """Whether the best is the lowest or the highest that was tried."""
        return self.best in (self.tried[0], self.tried[-1])


def rate_at(place: int) -> float:
    """The rate at a place of the scale 1, 3, 10, 30 ...

    >>> rate_at(-7), rate_at(-6), rate_at(0), rate_at(1)
    (0.0003, 0.001, 1.0, 3.0)
    """
    return float(f"{3 if place % 2 else 1}e{place // 2}")


def place_of(rate: float) -> int:
    """The place of the scale next to a rate."""
    return round(2.0 * math.log10(rate))


def search(at: Callable[[float], Tried], start: float) -> Found:
    """Try rates, beginning next to `start`, until the best has a worse one on either side, or MOST_RATES were tried."""
    tried: dict[int, Tried] = {}

    def gain(place: int) -> tuple[float, float]:
        if place not in tried and len(tried) < MOST_RATES:
            tried[place] = at(rate_at(place))
        return _worth(tried[place]) if place in tried else (math.inf, 0.0)

    best = place_of(start)
    for stride in (DECADE, NEXT):
        gain(best)
        while not tried[best].diverged and (gain(best + stride) < gain(best) or (stride == DECADE and not tried[best].seen)):
            best += stride
            if best not in tried:
                break
        best = min(tried, key=lambda place: _worth(tried[place]))
        while gain(best - stride) < gain(best):
            best -= stride
    return Found(tuple(tried[place] for place in sorted(tried)))


def _worth(one: Tried) -> tuple[float, float]:
    """Lower is better: by the change; of two that diverged the lower rate."""
    return one.mean, one.rate


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
