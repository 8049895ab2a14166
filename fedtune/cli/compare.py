"""`fedtune compare`: the same federation with several algorithms and seeds, as a table and figures."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.compare_tables import Sheet, as_json, budget_sheet, results_sheet, target_sheet
from fedtune.cli.presets import SetOption, find, parse_setting
from fedtune.cli.screen import Screen, print_json
from fedtune.errors import ConfigError, RunError
from fedtune.experiments import arms as experiment
from fedtune.experiments.cells import Finished, Outcome, run_cells
from fedtune.experiments.compare import Held, Planned, Result, held_against, plan, results, table
from fedtune.experiments.sources import check_sources
from fedtune.experiments.targets import ToTarget, WithBudget, bytes_of, to_target, with_budget
from fedtune.link import Link
from fedtune.numbers import in_time
from fedtune.report import table as tidy
from fedtune.report.figures import figures
from fedtune.run_folder import dated, replace_file, versions

ComparisonArgument = Annotated[
    str,
    typer.Argument(
        metavar="PRESET",
        help="A TOML file or a name from [bold]fedtune presets[/bold]; it may have tables [arms.NAME] (docs/comparisons.md).",
        show_default=False,
    ),
]
AlgorithmsOption = Annotated[
    str,
    typer.Option(
        "--algorithms",
        "-a",
        metavar="A,B,...",
        help="Arms of the file, or algorithms, also with settings of their own: fedavg:lr=1e-2 [dim](default: all arms)[/dim].",
        show_default=False,
    ),
]

OutOption = Annotated[
    str,
    typer.Option("--out", metavar="DIR", help="Folder [dim](default: runs/PRESET-DATE-TIME)[/dim].", show_default=False),
]
ONE_RATE = "One lr for methods with and without gradients suits one of them at most: give arms their own, as in fedavg:lr=1e-2."


def compare(
    preset: ComparisonArgument,
    algorithms: AlgorithmsOption = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, with seeds from the preset's on.")] = 5,
    settings: SetOption = [],  # noqa: B006 (typer reads the default and never changes it)
    out: OutOption = "",
    workers: Annotated[int, typer.Option(min=0, help="Runs at a time; 0: one a GPU, or one a CPU core.")] = 0,
    link: Annotated[
        str,
        typer.Option(help="Time on a simulated link too: 4g, dsl ..., or down=20,up=5,latency=40.", show_default=False),
    ] = "",
    against: Annotated[
        str, typer.Option(metavar="FILE", help="An earlier table.csv; says whether the results agree.", show_default=False)
    ] = "",
    target_loss: Annotated[
        list[float],
        typer.Option(
            "--target-loss",
            metavar="LOSS",
            help="Also: rounds and bytes that each arm needs to this held-out loss; may be given again.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer reads the default and never changes it)
    budget: Annotated[
        list[str],
        typer.Option(
            metavar="BYTES",
            help="Also: the best model of each arm for so many bytes of payload, as 10MB or 100kB; may be given again.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 (the same)
    json_wanted: Annotated[bool, typer.Option("--json", help="Print the results as the last line of stdout.")] = False,
) -> None:
    """Run a grid of algorithms and seeds, and write one table (CSV, Parquet) and figures (PNG, SVG).

    [bold]fedtune compare demo_ferret --algorithms ferret,fedavg,fedkseed:lr=3e-5 --seeds 3[/bold]

    [bold]fedtune compare comparisons/embedded --out runs/all[/bold]   the same again carries on what is not finished

    [bold]fedtune compare comparisons/headline --against simulations/results/headline.csv[/bold]

    [bold]fedtune compare comparisons/embedded --out runs/all --target-loss 0.2 --budget 1MB[/bold]   of the runs that are there

    Every run is an ordinary run folder, which fedtune report and fedtune ledger read.
    """
    screen = Screen(stderr=json_wanted)
    comparison = experiment.load(find(preset))
    chosen = experiment.choose(comparison, algorithms)
    overrides = dict(parse_setting(text) for text in settings)
    first = experiment.config_of(comparison, chosen[0], overrides).seed
    folder = Path(out or dated(comparison.name))
    simulated = Link.parse(link) if link else None
    budgets = [bytes_of(text) for text in budget]
    losses = [_finite(loss) for loss in target_loss]
    planned = plan(comparison, chosen, overrides, range(first, first + seeds), folder)
    before = tidy.read(Path(against)) if against else []
    shared = {(row.label, row.seed) for row in before} & {(one.arm.label, one.seed) for one in planned}
    if against and not shared:
        there = ", ".join(dict.fromkeys(row.label for row in before))
        raise ConfigError(f"'{against}' has no run of these arms and seeds to hold results against; its arms: {there}.")
    if experiment.one_rate_for_all(chosen, {**comparison.common, **overrides}):
        screen.say(ONE_RATE)
    cells = [cell for one in planned for cell in one.cells]
    screen.say(f"{len(chosen)} arms x {seeds} seeds: {len(cells)} runs, in {folder}")
    check_sources(cells)
    outcomes = run_cells(cells, workers=workers, progress=_said(screen))
    rows = table(planned, outcomes, comparison.name, simulated)
    found = _Found(
        results(rows, planned), [to_target(rows, loss) for loss in losses], [with_budget(rows, most) for most in budgets]
    )
    for sheet in found.sheets:
        screen.print(sheet.for_screen())
        screen.print()
    for line in _written(folder, rows, found, planned, simulated):
        screen.say(line)
    held = held_against(rows, before)
    for one in held:
        screen.say(_agreement(one))
    if json_wanted:
        print_json(found.as_json())
    _end(outcomes, held)


@dataclass(frozen=True)
class _Found:
    """What the rows of a comparison say: the results, and for each target and each budget what every arm has."""

    results: Sequence[Result]
    targets: Sequence[Sequence[ToTarget]]
    budgets: Sequence[Sequence[WithBudget]]

    @property
    def sheets(self) -> list[Sheet]:
        """The tables, in this order."""
        further = [*map(target_sheet, self.targets), *map(budget_sheet, self.budgets)]
        return [results_sheet(self.results), *(sheet for sheet in further if sheet.lines)]

    def as_json(self) -> list[dict[str, Any]]:
        """One object an arm."""
        return as_json(self.results, [one for of in self.targets for one in of], [one for of in self.budgets for one in of])


def _finite(loss: float) -> float:
    """A target; raises ConfigError for one that no loss can be held against."""
    if not math.isfinite(loss):
        raise ConfigError(f"--target-loss {loss} is no loss to reach: give a number of nats per token.")
    return loss


def _said(screen: Screen) -> Callable[[Finished], None]:
    """Prints a line for each run that ends, with the time that is left."""
    begun, ran = time.monotonic(), [0]

    def say(finished: Finished) -> None:
        outcome, left = finished.outcome, finished.total - finished.done
        ran[0] += outcome.again
        soon = f", about {in_time((time.monotonic() - begun) / ran[0] * left)} left" if ran[0] and left else ""
        loss = outcome.summary.get("final_loss") if outcome.summary else None
        said = f"held-out loss {loss:.4f}" if isinstance(loss, float) else outcome.problem or "no finite loss"
        accuracy = outcome.summary.get("final_accuracy") if outcome.summary else None
        said += f", accuracy {accuracy:.4f}" if isinstance(accuracy, float) else ""
        note = "" if outcome.again else " (was there)"
        line = f"{finished.done} of {finished.total}: {outcome.cell.name}: {said}{note}{soon}"
        screen.say(line)

    return say


def _written(folder: Path, rows: Sequence[tidy.Row], found: _Found, planned: Sequence[Planned], link: Link | None) -> list[str]:
    """Write the table, the summary and the figures; says where they are, and what was left out for want of a package."""
    if not rows:
        return ["No run was finished: there is no table."]
    said = [f"table: {tidy.write(rows, folder / 'table.csv')}"]
    settings = {one.arm.label: one.cells[0].settings.as_mapping() for one in planned}
    kept = {"results": found.as_json(), "settings": settings, "link": str(link or ""), "versions": versions()}
    replace_file(folder / "comparison.json", json.dumps(kept, indent=2).encode())
    replace_file(folder / "results.md", "\n".join(sheet.as_markdown() for sheet in found.sheets).encode())
    if importlib.util.find_spec("pyarrow"):
        said.append(f"table: {tidy.write(rows, folder / 'table.parquet')}")
    if importlib.util.find_spec("matplotlib"):
        drawn = figures(rows, folder / "figures")
        said.append(f"{len(drawn)} figures: {folder / 'figures'}")
    missing = [name for name in ("pyarrow", "matplotlib") if not importlib.util.find_spec(name)]
    if missing:
        said.append(f"Without {' and '.join(missing)} something is left out: pip install 'fedtune[experiments]'.")
    return said


def _agreement(one: Held) -> str:
    verdict = "agrees" if one.agrees else "DIFFERS"
    return f"{one.label}: {one.now:.4f}, before {one.before:.4f} ({verdict}; up to {one.allowed:.4f} is expected)"


def _end(outcomes: Sequence[Outcome], held: Sequence[Held]) -> None:
    """Raises RunError if a run failed or a result differs from the earlier table."""
    failed = [outcome for outcome in outcomes if outcome.problem]
    if failed:
        reasons = "; ".join(f"{outcome.cell.name}: {outcome.problem}" for outcome in failed[:3])
        raise RunError(f"{len(failed)} of {len(outcomes)} runs failed ({reasons}). The same command tries them again.")
    if any(not one.agrees for one in held):
        raise RunError("The results differ from the earlier table by more than their spread.")
