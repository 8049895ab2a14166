"""`fedtune compare`: the same federation with several algorithms and seeds, as a table and figures."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedtune.cli.presets import SetOption, find, parse_setting
from fedtune.cli.screen import Screen, print_json, quoted
from fedtune.errors import ConfigError, RunError
from fedtune.experiments import arms as experiment
from fedtune.experiments.cells import Finished, Outcome, run_cells
from fedtune.experiments.compare import Held, Planned, Result, held_against, plan, results, table
from fedtune.foreign import for_screen
from fedtune.link import Link
from fedtune.numbers import in_bytes, in_time
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as the last line of stdout.")] = False,
) -> None:
    """Run a grid of algorithms and seeds, and write one table (CSV, Parquet) and figures (PNG, SVG).

    [bold]fedtune compare demo_ferret --algorithms ferret,fedavg,fedkseed:lr=3e-5 --seeds 3[/bold]

    [bold]fedtune compare comparisons/embedded --out runs/all[/bold]   the same again carries on what is not finished

    [bold]fedtune compare comparisons/headline --against simulations/results/headline.csv[/bold]

    Every run is an ordinary run folder, which fedtune report and fedtune ledger read.
    """
    screen = Screen(stderr=as_json)
    comparison = experiment.load(find(preset))
    chosen = experiment.choose(comparison, algorithms)
    overrides = dict(parse_setting(text) for text in settings)
    first = experiment.config_of(comparison, chosen[0], overrides).seed
    folder = Path(out or dated(comparison.name))
    simulated = Link.parse(link) if link else None
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
    outcomes = run_cells(cells, workers=workers, progress=_said(screen))
    rows = table(planned, outcomes, comparison.name, simulated)
    found = results(rows, planned)
    screen.print(_as_table(found))
    for line in _written(folder, rows, found, planned, simulated):
        screen.say(line)
    held = held_against(rows, before)
    for one in held:
        screen.say(_agreement(one))
    if as_json:
        print_json(_as_json(found))
    _end(outcomes, held)


def _said(screen: Screen) -> Callable[[Finished], None]:
    """Prints a line for each run that ends, with the time that is left."""
    begun, ran = time.monotonic(), [0]

    def say(finished: Finished) -> None:
        outcome, left = finished.outcome, finished.total - finished.done
        ran[0] += outcome.again
        soon = f", about {in_time((time.monotonic() - begun) / ran[0] * left)} left" if ran[0] and left else ""
        loss = outcome.summary.get("final_loss") if outcome.summary else None
        said = f"held-out loss {loss:.4f}" if isinstance(loss, float) else outcome.problem or "no finite loss"
        note = "" if outcome.again else " (was there)"
        line = f"{finished.done} of {finished.total}: {outcome.cell.name}: {said}{note}{soon}"
        screen.say(line)

    return say


HEADS = ("seeds", "held-out\nloss", "±", "up", "down", "whole\nrun", "CPU\ntime", "peak\nmemory")
CAPTION = "up, down: payload of a client and round; ±: standard deviation over seeds"


def _cells(result: Result) -> list[str]:
    """A line of the results, as HEADS names them."""
    return [
        str(result.seeds),
        f"{result.loss:.4f}",
        f"{result.spread:.4f}",
        in_bytes(result.up),
        in_bytes(result.down),
        in_bytes(result.total),
        in_time(result.cpu_seconds),
        in_bytes(result.memory),
    ]


def _as_table(found: Sequence[Result]) -> Table:
    view = Table(box=None, pad_edge=False, caption=CAPTION)
    view.add_column("")  # the one that wraps where the terminal is narrow
    for name in HEADS:
        view.add_column(quoted(name), justify="right", no_wrap=True)
    for result in found:
        view.add_row(result.label, *_cells(result))
    return view


def _as_json(found: Sequence[Result]) -> list[dict[str, object]]:
    """JSON has no NaN: the loss of an arm that diverged is null."""
    return [{**asdict(one), "loss": one.loss if math.isfinite(one.loss) else None} for one in found]


def _as_markdown(found: Sequence[Result]) -> str:
    """The same for a document."""
    lines = [
        ["", *(head.replace("\n", " ") for head in HEADS)],
        ["---", *("---:" for _ in HEADS)],
        *([for_screen(result.label).replace("|", r"\|"), *_cells(result)] for result in found),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{CAPTION}\n"


def _written(
    folder: Path, rows: Sequence[tidy.Row], found: Sequence[Result], planned: Sequence[Planned], link: Link | None
) -> list[str]:
    """Write the table, the summary and the figures; says where they are, and what was left out for want of a package."""
    if not rows:
        return ["No run was finished: there is no table."]
    said = [f"table: {tidy.write(rows, folder / 'table.csv')}"]
    settings = {one.arm.label: one.cells[0].settings.as_mapping() for one in planned}
    kept = {"results": _as_json(found), "settings": settings, "link": str(link or ""), "versions": versions()}
    replace_file(folder / "comparison.json", json.dumps(kept, indent=2).encode())
    replace_file(folder / "results.md", _as_markdown(found).encode())
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
