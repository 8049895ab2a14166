"""A sweep: all combinations run a part of the rounds, the best are carried on, rung after rung, to the preset's rounds.

What a sweep knows is in its run folders alone. The same call again finds them, runs what is missing, and decides the same; with
more values it adds the new combinations.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.divergence import blown_up
from fedtune.errors import DivergedError, NonFiniteError, UnchangedError
from fedtune.experiments.cells import Cell, Finished, Outcome, ended_with, reached, run_cells
from fedtune.experiments.grid import Combination
from fedtune.experiments.halving import survivors
from fedtune.ledger import Ledger
from fedtune.ledger_file import LEDGER


@dataclass(frozen=True)
class Plan:
    """What is run: every combination with every seed, to the rounds of each rung, in folders under `out`."""

    combinations: tuple[Combination, ...]
    seeds: tuple[int, ...]
    rungs: tuple[int, ...]
    keep: float
    out: Path

    def cell(self, combination: Combination, seed: int, rounds: int) -> Cell:
        """One run."""
        folder = self.out / f"{combination.folder}_seed_{seed}"
        settings = combination.settings.replace(seed=seed, rounds=rounds, out=str(folder))
        return Cell(f"{combination.name} seed={seed}", settings)

    def work(self, rung: int, combinations: int) -> int:
        """Rounds of all runs that take so many combinations through a rung."""
        before = self.rungs[rung - 1] if rung else 0
        return combinations * len(self.seeds) * (self.rungs[rung] - before)


@dataclass(frozen=True)
class Result:
    """How a combination fared.

    Attributes:
        rounds: that its runs were compared at last; losses: held-out, by seed, after them (not finite: diverged).
        base: held-out loss of the base model; None where no run got as far.
        stopped: why it was not carried on; "": it ran all rounds.
    """

    combination: Combination
    rounds: int
    losses: tuple[float, ...]
    base: float | None
    stopped: str

    @property
    def mean(self) -> float:
        """Over seeds; not finite if one is."""
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None with one seed."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 and math.isfinite(self.mean) else None


@dataclass(frozen=True)
class Progress:
    """A run of rung `rung` (from 0) has ended. `loss` is its own, `best` the lowest of the rung so far, with its name.

    `seconds_left` of the whole sweep, from the rounds done in this call; None before the first.
    """

    rung: int
    finished: Finished
    loss: float
    best: tuple[float, str]
    seconds_left: float | None


def run_sweep(plan: Plan, *, workers: int = 0, told: Callable[[Progress], None] | None = None) -> list[Result]:
    """Run, or carry on, the sweep; results best first: longest runs, then sound ones, then by mean loss.

    Raises:
        RunFolderError: a folder holds a run with other settings. Interrupted: Ctrl-C; the same call carries on.
    """
    alive, results = plan.combinations, dict[str, Result]()
    pace = _Pace(plan)
    for rung, rounds in enumerate(plan.rungs):
        problems = _climb(plan, rung, alive, workers, _Teller(plan, rung, pace, told))
        found = {one.name: _result(plan, one, rounds, problems) for one in alive}
        results |= found
        if rung + 1 < len(plan.rungs):
            best = survivors({name: math.nan if result.stopped else result.mean for name, result in found.items()}, plan.keep)
            results |= {name: _stopped(found[name], len(best), len(alive)) for name in found if name not in best}
            alive = tuple(one for one in alive if one.name in best)  # in the order of the grid
            pace.settle(rung, len(alive))
    return sorted(results.values(), key=lambda result: (-result.rounds, bool(result.stopped), _comparable(result.mean)))


def _climb(plan: Plan, rung: int, alive: Sequence[Combination], workers: int, teller: _Teller) -> dict[str, str]:
    """Bring the runs of `alive` to the end of the rung; why each of those that failed did, by the name of its cell."""
    cells = [plan.cell(one, seed, plan.rungs[rung]) for one in alive for seed in plan.seeds]
    over = {cell.name: why for cell in cells if (why := _hopeless(cell))}
    left = [cell for cell in cells if cell.name not in over and not _is_there(cell)]
    teller.skip(len(cells) - len(left))
    outcomes = run_cells(left, workers=workers, progress=teller)
    return over | {outcome.cell.name: outcome.problem for outcome in outcomes if outcome.problem}


def _is_there(cell: Cell) -> bool:
    """Whether its run got so far before; one that has other settings is left to `run_cells`, which refuses it."""
    folder = Path(cell.settings.out)
    if not (folder / LEDGER).is_file() or not reached(folder, cell.settings.rounds):
        return False
    run_cells([cell])  # holds the settings against those of the folder, and starts nothing
    return True


def _hopeless(cell: Cell) -> str:
    """Why the run in the folder of `cell` came to nothing when it was run before: it would again. "" if it did not."""
    return ended_with(cell.settings.out, DivergedError, UnchangedError)


# ---------------------------------------------------------------------- results


def loss_after(folder: str | Path, rounds: int) -> float:
    """The held-out loss of the run in `folder` after `rounds` rounds; NaN where there is none, or it was not finite."""
    if not (Path(folder) / LEDGER).is_file():
        return math.nan
    with Ledger.open(Path(folder)) as ledger:
        found = [event.detail["eval_loss"] for event in ledger.events("evaluation") if event.round == rounds]
    return float(found[-1]) if found and found[-1] is not None else math.nan


def _result(plan: Plan, combination: Combination, rounds: int, problems: Mapping[str, str]) -> Result:
    cells = [plan.cell(combination, seed, rounds) for seed in plan.seeds]
    losses = tuple(math.nan if cell.name in problems else loss_after(cell.settings.out, rounds) for cell in cells)
    base = loss_after(cells[0].settings.out, 0)
    found = zip(cells, losses, strict=True)
    reasons = [f"seed {cell.settings.seed}: {why}" for cell, loss in found if (why := _why(cell, loss, base, problems))]
    return Result(combination, rounds, losses, base if math.isfinite(base) else None, "; ".join(reasons))


def _why(cell: Cell, loss: float, base: float, problems: Mapping[str, str]) -> str:
    """Why a run is not carried on, whatever the others are; "" if nothing is wrong with it."""
    if cell.name in problems:
        return problems[cell.name]
    if not math.isfinite(loss):
        return f"no finite held-out loss after {cell.settings.rounds} rounds"
    if blown_up(loss, base):
        return f"diverged: held-out loss {loss:.4g} after {cell.settings.rounds} rounds, {base:.4g} before the first"
    refused = _not_finite(cell)
    return f"diverged: {refused}" if refused else ""


def _not_finite(cell: Cell) -> str:
    """The reason why the updates of a round were refused, if none was finite; "" if every round had one that was."""
    folder = Path(cell.settings.out)
    if not (folder / LEDGER).is_file():
        return ""
    with Ledger.open(folder) as ledger:
        for row in ledger.rounds():
            reasons = list(row.refused.values())
            lost = [reason for reason in reasons if reason.startswith(NonFiniteError.__name__)]
            if lost and len(reasons) == len(row.clients) and row.number <= cell.settings.rounds:
                return lost[0].removeprefix(f"{NonFiniteError.__name__}: ")
    return ""


def _stopped(result: Result, kept: int, of: int) -> Result:
    if result.stopped:
        return result
    return replace(result, stopped=f"not among the best {kept} of {of} after {result.rounds} rounds")


def _comparable(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


# ---------------------------------------------------------------------- progress


class _Pace:
    """How long the rest takes, from the rounds that this call has done, as if every round cost the same."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._begun, self._done = plan, time.monotonic(), 0.0
        count = len(plan.combinations)
        self._left = 0.0
        for rung in range(len(plan.rungs)):
            self._left += plan.work(rung, count)
            count = math.ceil(round(plan.keep * count, 9))

    def run(self, rung: int, done: bool) -> None:
        """A run of the rung has ended; `done`: in this call, and not before."""
        rounds = self._plan.work(rung, 1) / len(self._plan.seeds)
        self._left -= rounds
        self._done += rounds if done else 0.0

    def settle(self, rung: int, alive: int) -> None:
        """So many combinations are left after the rung: what is left to do follows."""
        self._left = 0.0
        for later in range(rung + 1, len(self._plan.rungs)):
            self._left += self._plan.work(later, alive)
            alive = math.ceil(round(self._plan.keep * alive, 9))

    @property
    def seconds_left(self) -> float | None:
        """None before the first run of this call."""
        return (time.monotonic() - self._begun) / self._done * max(0.0, self._left) if self._done else None


class _Teller:
    """Makes what `run_cells` says of a cell into what is said of the sweep."""

    def __init__(self, plan: Plan, rung: int, pace: _Pace, told: Callable[[Progress], None] | None) -> None:
        self._plan, self._rung, self._pace, self._told = plan, rung, pace, told
        self._best, self._skipped = (math.inf, ""), 0

    def skip(self, count: int) -> None:
        """So many runs of the rung were there already."""
        self._skipped = count
        for _ in range(count):
            self._pace.run(self._rung, done=False)

    def __call__(self, finished: Finished) -> None:
        """A cell has ended."""
        self._pace.run(self._rung, done=True)
        outcome: Outcome = finished.outcome
        loss = math.nan if outcome.problem else loss_after(outcome.cell.settings.out, self._plan.rungs[self._rung])
        if loss < self._best[0]:
            self._best = (loss, outcome.cell.name)
        shown = replace(finished, done=finished.done + self._skipped, total=finished.total + self._skipped)
        if self._told:
            self._told(Progress(self._rung, shown, loss, self._best, self._pace.seconds_left))
