"""What a comparison costs and buys: bytes and rounds to a held-out loss, and the best model for a budget of bytes.

Both read the rows of the tidy table, seed by seed. A model counts where it was evaluated, so with `eval_every` above 1 an arm
may have been there some rounds earlier. Bytes are payload of all clients together; means and deviations are over seeds.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedtune.errors import ConfigError
from fedtune.foreign import for_screen
from fedtune.report.table import Row, measured

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{kind}": base**power for power, prefix in enumerate("kmgt", start=1) for kind, base in (("b", 1000), ("ib", 1024))
}
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.ASCII)


def bytes_of(text: str) -> int:
    """A number of bytes as people write it, whole bytes, rounded down.

    >>> bytes_of("10MB"), bytes_of("1.5 kB"), bytes_of("2 KiB"), bytes_of("700")
    (10000000, 1500, 2048, 700)

    Raises:
        ConfigError: no number, or an unknown unit.
    """
    found = _BYTES.fullmatch(text.strip().lower())
    if not found or found[2] not in _UNITS or len(found[1]) > 18:
        raise ConfigError(f"'{for_screen(text, 40)}' is no number of bytes: write 10MB, 100kB, 2GiB or 5000.")
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and its standard deviation (0 with one seed)."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Over `values`; None if one of them is not finite, or there is none."""
        if not values or not all(map(math.isfinite, values)):
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass(frozen=True)
class ToTarget:
    """What an arm needed until its held-out loss was at `loss` or below, over the seeds that came there.

    Attributes:
        seeds, reached: how many there are, and how many came there. The others say nothing in the means.
        rounds: after which the loss was measured so; 0 for the base model.
        up, down: payload bytes of all clients until then. None, as `rounds`, if no seed came there.
    """

    label: str
    loss: float
    seeds: int
    reached: int
    rounds: Spread | None
    up: Spread | None
    down: Spread | None


@dataclass(frozen=True)
class WithBudget:
    """The model with the lowest held-out loss that an arm had before it had sent more than `budget` bytes, up and down.

    Attributes:
        rounds: after which it was; 0 where the first round was too dear, and the base model is the best.
        sent: payload bytes of all clients up to it, both directions.
        loss, accuracy, rouge_l, exact_match: of this model; None where a seed has no finite one.
    """

    label: str
    budget: int
    seeds: int
    rounds: Spread | None
    sent: Spread | None
    loss: Spread | None
    accuracy: Spread | None
    rouge_l: Spread | None
    exact_match: Spread | None


def to_target(rows: Sequence[Row], loss: float) -> list[ToTarget]:
    """For each label of the table, in its order."""
    return [_to_target(label, runs, loss) for label, runs in _runs(rows).items()]


def _to_target(label: str, runs: Sequence[Sequence[Row]], loss: float) -> ToTarget:
    there = [run[: number + 1] for run in runs if (number := _first_at(run, loss)) is not None]
    return ToTarget(
        label=label,
        loss=loss,
        seeds=len(runs),
        reached=len(there),
        rounds=Spread.of([run[-1].round for run in there]),
        up=Spread.of([sum(row.bytes_up for row in run) for run in there]),
        down=Spread.of([sum(row.bytes_down for row in run) for run in there]),
    )


def _first_at(run: Sequence[Row], loss: float) -> int | None:
    """The place of the first row whose loss is at most `loss`."""
    return next((n for n, row in enumerate(run) if (found := measured(row.eval_loss)) is not None and found <= loss), None)


def with_budget(rows: Sequence[Row], budget: int) -> list[WithBudget]:
    """For each label of the table, in its order."""
    return [_with_budget(label, runs, budget) for label, runs in _runs(rows).items()]


def _with_budget(label: str, runs: Sequence[Sequence[Row]], budget: int) -> WithBudget:
    best = [_best(run, budget) for run in runs]

    def over(read: Callable[[Row], float | None]) -> Spread | None:
        values = [measured(read(row)) if row else None for row in best]
        return Spread.of([math.nan if value is None else value for value in values])

    return WithBudget(
        label=label,
        budget=budget,
        seeds=len(runs),
        rounds=over(lambda row: row.round),
        sent=over(lambda row: row.cumulative_bytes),
        loss=over(lambda row: row.eval_loss),
        accuracy=over(lambda row: row.accuracy),
        rouge_l=over(lambda row: row.rouge_l),
        exact_match=over(lambda row: row.exact_match),
    )


def _best(run: Sequence[Row], budget: int) -> Row | None:
    """The row with the lowest loss, the first of equals, among those within the budget."""
    within = [row for row in run if row.cumulative_bytes <= budget and measured(row.eval_loss) is not None]
    return min(within, key=lambda row: (row.eval_loss, row.round), default=None)


def _runs(rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """By label: the rows of each seed in the order of rounds."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        found.setdefault(row.label, {}).setdefault(row.seed, []).append(row)
    return {label: [sorted(run, key=lambda row: row.round) for run in seeds.values()] for label, seeds in found.items()}
