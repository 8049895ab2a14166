"""A comparison: the same federation with several algorithms and seeds, as one tidy table and a summary of each arm.

All arms have the data, the partition, the held-out rows, the clients of every round and the evaluation of the same seed. The
arm `local` is one run for each client, whose mean it is; its clients train in every round, with so many steps that their
samples are those of a client that is asked now and then.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.config import Scalar
from fedtune.experiments.arms import Arm, Comparison, config_of
from fedtune.experiments.cells import Cell, Outcome
from fedtune.experiments.targets import Spread
from fedtune.link import Link, link_seconds
from fedtune.report.table import Row, measured, rows_of
from fedtune.run_folder import RunFolder


@dataclass(frozen=True)
class Planned:
    """The runs of one arm with one seed: one, or for `local` one for each client."""

    arm: Arm
    seed: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Result:
    """An arm over its seeds.

    Attributes:
        label, seeds: which arm, how many seeds.
        loss, spread: final held-out loss: mean, and standard deviation over seeds (0 with one).
        up, down: payload bytes of a client and round, mean.
        total: payload bytes of a whole run, all clients, mean.
        cpu_seconds: CPU time of a whole run, mean.
        memory: peak memory of the process in bytes, mean.
        accuracy, rouge_l, exact_match: of the final models; None where a run has none.
    """

    label: str
    seeds: int
    loss: float
    spread: float
    up: float
    down: float
    total: float
    cpu_seconds: float
    memory: float
    accuracy: Spread | None = None
    rouge_l: Spread | None = None
    exact_match: Spread | None = None


def plan(
    comparison: Comparison, arms: Sequence[Arm], overrides: Mapping[str, Scalar], seeds: Sequence[int], folder: Path
) -> list[Planned]:
    """The runs, each with a folder of its own below `folder`; seed by seed, so that a first picture comes early.

    Raises:
        ConfigError: the settings of an arm cannot be used.
    """
    return [Planned(arm, seed, _cells(comparison, arm, overrides, seed, folder)) for seed in seeds for arm in arms]


def _cells(comparison: Comparison, arm: Arm, overrides: Mapping[str, Scalar], seed: int, folder: Path) -> tuple[Cell, ...]:
    config = config_of(comparison, arm, {**overrides, "seed": seed}).with_absolute_paths()
    place = folder / "runs" / arm.name
    if arm.algorithm != "local" or config.only_client:
        return (Cell(f"{arm.name}, seed {seed}", config.replace(out=str(place / f"seed-{seed}"))),)
    share = max(1, round(config.local_steps * config.asked_per_round / config.clients))
    alone = config.replace(local_steps=share) if "local_steps" not in arm.settings else config
    return tuple(
        Cell(
            f"{arm.name}, client {client}, seed {seed}",
            alone.replace(only_client=str(client), out=str(place / f"seed-{seed}-client-{client}")),
        )
        for client in range(config.clients)
    )


# ---------------------------------------------------------------------- the table


def table(planned: Iterable[Planned], outcomes: Sequence[Outcome], preset: str, link: Link | None) -> list[Row]:
    """The rows of every run that is finished, those of `local` as means over its clients."""
    summaries = {outcome.cell.name: outcome.summary for outcome in outcomes if outcome.summary}
    rows: list[Row] = []
    for one in planned:
        if all(cell.name in summaries for cell in one.cells):
            runs = [_rows(one, cell, summaries[cell.name], preset, link) for cell in one.cells]
            rows += [_mean(same) for same in zip(*runs, strict=True)]
    return rows


def _rows(one: Planned, cell: Cell, summary: Mapping[str, object], preset: str, link: Link | None) -> list[Row]:
    metrics = RunFolder.open(cell.settings.out).read_metrics()
    rows = rows_of(metrics, preset=preset, algorithm=one.arm.algorithm, label=one.arm.label, seed=one.seed)
    peak = summary.get("peak_memory_bytes")
    on_link = link_seconds(metrics, link) if link else [None] * len(rows)
    return [
        replace(row, peak_memory_bytes=int(peak) if isinstance(peak, int) else None, link_seconds=seconds)
        for row, seconds in zip(rows, on_link, strict=True)
    ]


def _mean(rows: Sequence[Row]) -> Row:
    """Of the same round of several clients that train alone: means of what was measured, the greatest memory."""
    if len(rows) == 1:
        return rows[0]
    peaks = [row.peak_memory_bytes for row in rows if row.peak_memory_bytes is not None]
    return replace(
        rows[0],
        eval_loss=_middle([row.eval_loss for row in rows]),
        eval_loss_sample_mean=_middle([row.eval_loss_sample_mean for row in rows]),
        accuracy=_middle([row.accuracy for row in rows]),
        rouge_l=_middle([row.rouge_l for row in rows]),
        exact_match=_middle([row.exact_match for row in rows]),
        seconds=_middle([row.seconds for row in rows]) or 0.0,
        cpu_seconds=_middle([row.cpu_seconds for row in rows]),
        peak_memory_bytes=max(peaks, default=None),
    )


def _middle(values: Sequence[float | None]) -> float | None:
    """The mean, if all are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


# ---------------------------------------------------------------------- the summary


def results(rows: Sequence[Row], planned: Sequence[Planned]) -> list[Result]:
    """One for each arm with a finished run, in the order of the comparison."""
    labels = dict.fromkeys(one.arm.label for one in planned)
    return [_result(label, [row for row in rows if row.label == label], planned) for label in labels if _has(rows, label)]


def _has(rows: Sequence[Row], label: str) -> bool:
    return any(row.label == label for row in rows)


def _result(label: str, rows: Sequence[Row], planned: Sequence[Planned]) -> Result:
    last = [max((row for row in rows if row.seed == seed), key=lambda row: row.round) for seed in {row.seed for row in rows}]
    losses = [row.eval_loss if row.eval_loss is not None else math.nan for row in last]
    config = next(one for one in planned if one.arm.label == label).cells[0].settings
    messages = len(last) * config.rounds * config.invited_per_round
    return Result(
        label=label,
        seeds=len(last),
        loss=sum(losses) / len(losses),
        spread=statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else 0.0,
        up=sum(row.bytes_up for row in rows) / messages,
        down=sum(row.bytes_down for row in rows) / messages,
        total=sum(row.cumulative_bytes for row in last) / len(last),
        cpu_seconds=sum(row.cpu_seconds or 0.0 for row in last) / len(last),
        memory=sum(row.peak_memory_bytes or 0 for row in last) / len(last),
        accuracy=_spread([row.accuracy for row in last]),
        rouge_l=_spread([row.rouge_l for row in last]),
        exact_match=_spread([row.exact_match for row in last]),
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    return Spread.of([math.nan if value is None else value for value in values])


@dataclass(frozen=True)
class Held:
    """An arm beside the same arm of an earlier table: final losses, and whether they agree."""

    label: str
    before: float
    now: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the means are as near as their spreads let one expect."""
        return abs(self.before - self.now) <= self.allowed


LEAST = 0.002
"""Nats by which means may always differ: other processors round some operations of a model in another way."""


def held_against(now: Sequence[Row], before: Sequence[Row]) -> list[Held]:
    """Every arm that both tables have, over the seeds that both have.

    Means may differ by three standard errors: of as many runs as are compared, from the spread over all seeds of the earlier
    table; or by LEAST.
    """
    found = []
    for label in dict.fromkeys(row.label for row in before):
        then, here = _last_losses(before, label), _last_losses(now, label)
        seeds = sorted(then.keys() & here.keys())
        if seeds:
            one, other = (sum(losses[seed] for seed in seeds) / len(seeds) for losses in (then, here))
            spread = statistics.stdev(then.values()) if len(then) > 1 else 0.0
            found.append(Held(label, one, other, max(3 * spread / math.sqrt(len(seeds)), LEAST)))
    return found


def _last_losses(rows: Sequence[Row], label: str) -> dict[int, float]:
    """By seed: the held-out loss after the last round."""
    mine = sorted((row for row in rows if row.label == label), key=lambda row: row.round)
    return {row.seed: loss for row in mine if (loss := measured(row.eval_loss)) is not None}
