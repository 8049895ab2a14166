"""From the tidy table to what figures draw: means and spreads over seeds, pure numbers without matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fedtune.report.table import Row, measured


@dataclass(frozen=True)
class Point:
    """After one round: `x`, and `y` with the least and the greatest over the seeds that measured both."""

    x: float
    y: float
    low: float
    high: float
    seeds: int


Measure = Callable[[Row], float | int | None]


def labels(table: Iterable[Row]) -> list[str]:
    """The series of a table in the order in which they appear."""
    return list(dict.fromkeys(row.label for row in table))


def of_label(table: Iterable[Row], label: str) -> list[Row]:
    """The rows of one series."""
    return [row for row in table if row.label == label]


def curve(rows: Sequence[Row], x: Measure, y: Measure) -> list[Point]:
    """One point a round, in the order of rounds: means over the seeds, and the spread of `y`.

    A row without a finite `x` or `y` is left out; a round without any has no point.
    """
    points = []
    for number in sorted({row.round for row in rows}):
        pairs = [(finite(x(row)), finite(y(row))) for row in rows if row.round == number]
        known = [(one, other) for one, other in pairs if one is not None and other is not None]
        if known:
            ys = [other for _, other in known]
            points.append(Point(mean([one for one, _ in known]), mean(ys), min(ys), max(ys), len(known)))
    return points


def of_base(table: Iterable[Row], measure: Measure) -> float | None:
    """A measure of the base model: the mean of round 0 over all runs that measured it."""
    found = [value for row in table if row.round == 0 and (value := finite(measure(row))) is not None]
    return mean(found) if found else None


def bytes_a_round(rows: Iterable[Row], measure: Measure) -> float | None:
    """Mean of a measure over all trained rounds and seeds; None without a trained round."""
    found = [value for row in rows if row.round > 0 and (value := finite(measure(row))) is not None]
    return mean(found) if found else None


def peaks(rows: Sequence[Row], measure: Measure) -> list[float]:
    """For each seed that measured it the greatest value."""
    found: dict[int, float] = {}
    for row in rows:
        value = finite(measure(row))
        if value is not None:
            found[row.seed] = max(value, found.get(row.seed, value))
    return list(found.values())


def mean(values: Sequence[float]) -> float:
    """The same in any order."""
    return math.fsum(values) / len(values)


def finite(value: float | int | None) -> float | None:
    """`value` as a float, None if there is none, or it is not finite or too large to be added to others."""
    return measured(value)
