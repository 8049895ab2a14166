"""What a sweep prints: its progress, its table, what to use, and what slopes say about the learning rate in plain English."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from fedtune.cli.numbers import in_about, in_loss
from fedtune.config import RunConfig, Scalar
from fedtune.experiments.sweep import Plan, Progress, Result

if TYPE_CHECKING:
    from fedtune.experiments.rate import Measured
    from fedtune.experiments.slopes import Advice, Points

CHOSEN_ON = (
    "These losses chose the values, so they flatter the winner: report it on held-out samples that had no part in the choice "
    "(--set holdout_category=ANOTHER, or --set holdout_file=FILE)."
)


def progress_line(plan: Plan, progress: Progress) -> str:
    """A run that has ended, how many of its stage are left, the best so far, and the time left."""
    finished = progress.finished
    outcome = finished.outcome
    what = f"failed: {outcome.problem}" if outcome.problem else f"held-out loss {in_loss(progress.loss)}"
    parts = [
        f"stage {progress.rung + 1} of {len(plan.rungs)} (to round {plan.rungs[progress.rung]}), "
        f"run {finished.done} of {finished.total}: {outcome.cell.name}, {what}"
    ]
    if progress.best[1]:
        parts.append(f"best so far {in_loss(progress.best[0])} ({progress.best[1]})")
    if progress.seconds_left is not None:
        parts.append(f"about {in_about(progress.seconds_left)} left")
    return "; ".join(parts)


# ---------------------------------------------------------------------- results


def results_table(results: Sequence[Result]) -> Table:
    """A row a combination, the best first."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for key in results[0].combination.values:
        table.add_column(key, no_wrap=True, justify="right")
    for name in ("rounds", "held-out loss", "spread", "change"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("", overflow="fold")
    for number, result in enumerate(results):
        spread = "-" if result.spread is None else f"{result.spread:.4f}"
        change = f"{result.mean - result.base:+.4f}" if result.base is not None and math.isfinite(result.mean) else "-"
        cells = [*map(str, result.combination.values.values()), str(result.rounds), in_loss(result.mean), spread, change]
        table.add_row(*cells, result.stopped, style="bold" if not number and not result.stopped else "")
    return table


def closing_lines(plan: Plan, results: Sequence[Result], command: str) -> list[str]:
    """What to use, how sure that is, and what the losses are not good for. `command`: the run without the swept values."""
    best = results[0]
    if best.stopped:
        return ["No combination has run all rounds: look at the reasons above."]
    values = "".join(f" --set {key}={value}" for key, value in best.combination.values.items())
    lines = ["", f"Best: {best.combination.name}. To use it:", f"  {command}{values}"]
    if best.base is not None and best.mean >= best.base:
        lines.append(f"It is no better than the base model ({in_loss(best.base)}): try smaller rates, or more rounds.")
    return [*lines, *_doubts(plan, results), CHOSEN_ON]


def _doubts(plan: Plan, results: Sequence[Result]) -> list[str]:
    """What the choice leaves open: values at the end of their range, and differences within the spread."""
    best, lines = results[0], list[str]()
    for key, value in best.combination.values.items():
        tried = sorted({_number(one.values[key]) for one in plan.combinations})
        if len(tried) > 1 and math.isfinite(tried[0]) and _number(value) in (tried[0], tried[-1]):
            end = "largest" if _number(value) == tried[-1] else "smallest"
            lines.append(f"{key}={value} is the {end} value tried: go on beyond it (the same --out adds to this sweep).")
    rivals = [one for one in results[1:] if not one.stopped]
    if len(best.losses) == 1:
        lines.append("One seed: a difference may be chance; --seeds 3 shows the spread.")
    elif rivals and rivals[0].mean - best.mean < (best.spread or 0.0):
        lines.append(f"The difference to {rivals[0].combination.name} is within the spread over seeds.")
    return lines


def _number(value: Scalar) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def as_mapping(plan: Plan, result: Result) -> dict[str, object]:
    """A result as JSON types and as a row of sweep.csv; a loss that is not finite is null."""
    mean = result.mean
    return {
        **result.combination.values,
        "rounds": result.rounds,
        "seeds": len(plan.seeds),
        "loss": mean if math.isfinite(mean) else None,
        "spread": result.spread,
        "base_loss": result.base,
        "stopped": result.stopped,
        "folder": result.combination.folder,
    }


def csv_of(plan: Plan, results: Sequence[Result]) -> bytes:
    """sweep.csv: a line of names, then a line a combination, the best first; losses with all their digits."""
    rows = [as_mapping(plan, result) for result in results]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


# ---------------------------------------------------------------------- the learning rate


def points_line(points: Points, weights: int, *, asked: tuple[int, int]) -> str:
    """What will be measured; where the size of the model made that less, also why, and how to have more.

    `asked`: directions and batches of the command line, 0 where they were left to the size of the model.
    """
    from fedtune.experiments.slopes import POINTS

    line = f"measuring slopes along {points.directions} directions on {points.batches} batches each"
    whole = POINTS[0]
    pairs = zip(asked, (points.directions, points.batches), (whole.directions, whole.batches), strict=True)
    if not any(not by_hand and used < most for by_hand, used, most in pairs):
        return line
    return (
        f"{line}: {points.passes:,} forward passes at most, fewer than on a small model, since each takes long with "
        f"{weights:,} weights. For smaller errors: --directions {whole.directions} --batches {whole.batches} "
        f"({whole.passes:,} passes)"
    )


def advice_lines(advice: Advice, config: RunConfig) -> list[str]:
    """What the slopes say, with their standard errors."""
    found = advice.rate
    lines = [
        f"slopes: {found.directions} directions x {found.batches} batches at eps {advice.eps:g}, mean size {found.slope:.3g}, "
        f"loss {advice.loss:.4f}",
        f"signal: {_measured(found.share)} of a slope's square is the gradient, the rest is the batch's noise "
        f"({_measured(found.signal)} of {_measured(found.square)})",
        f"curvature along a direction: {_measured(found.curvature)} (second differences at {advice.distance:g})",
    ]
    return [*lines, *(_rate_lines(advice, config) if found.seen else _unseen_lines(advice))]


def _rate_lines(advice: Advice, config: RunConfig) -> list[str]:
    found = advice.rate
    several = "which share directions" if advice.shared else "with directions of their own"
    lines = [
        f"recommended lr: {found.step.value:.2g} (standard error {found.step.error:.1g}), where one client's step gains most; "
        f"beyond {found.largest:.2g} a step makes things worse",
        f"steps at that lr: {_steps(advice, found.step.value)} move the weights by 1 % of their norm; "
        f"this preset has lr {config.lr:g}",
    ]
    if advice.clients > 1:
        lines.insert(
            1, f"averaged over {advice.clients} clients {several}: the mean model gains most at {found.averaged.value:.2g} "
            f"(standard error {found.averaged.error:.1g}), which is the upper end of a sweep",
        )  # fmt: skip
    return lines


def _unseen_lines(advice: Advice) -> list[str]:
    found = advice.rate
    if not found.bends:
        return ["no recommendation: the curvature is below its noise, so nothing here bounds lr; sweep it"]
    guess = f"; at a guess {found.step.value:.2g} (standard error {found.step.error:.1g})" if found.step.value > 0 else ""
    return [
        f"no recommendation: the signal is below its noise{guess}. Measure more (--directions, and --batches, which costs as "
        f"much and helps more as long as it is below {_most_batches(found.share.value)}), or sweep lr",
        f"upper end of a sweep: {found.ceiling:.2g}, above which one client's best lr hardly is"
        + (f"; up to {advice.clients} times that for the mean of {advice.clients} clients" if advice.clients > 1 else ""),
    ]


def _most_batches(share: float) -> int:
    """Batches a direction above which further directions help more: about 1 / share, where noise no longer dominates."""
    return min(256, max(8, round(1.0 / share))) if share > 0.0 else 256


def _steps(advice: Advice, learning_rate: float) -> str:
    from fedtune.experiments.rate import steps_to_move

    steps = steps_to_move(
        0.01, learning_rate=learning_rate, rate=advice.rate, norm=advice.norm, weights=advice.weights, per_step=advice.per_step
    )
    return f"{max(1, round(steps)):,}" if math.isfinite(steps) else "no number of steps"


def _measured(found: Measured) -> str:
    return f"{found.value:.3g} +- {_rounded(found.error)}"


def _rounded(value: float) -> str:
    """Two digits, and no exponent below a million."""
    return f"{float(f'{value:.2g}'):g}"
