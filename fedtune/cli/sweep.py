"""`fedtune sweep`: which learning rate, K, steps or eps, by runs that are stopped early, or by measuring slopes."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli import presets
from fedtune.cli.presets import PresetArgument, SetOption
from fedtune.cli.range_lines import as_json as range_json
from fedtune.cli.range_lines import range_lines, tried_line
from fedtune.cli.screen import Screen, print_json
from fedtune.cli.sweep_table import advice_lines, as_mapping, closing_lines, csv_of, points_line, progress_line, results_table
from fedtune.cli.watch import saying_steps
from fedtune.config import RunConfig
from fedtune.experiments.grid import Axis, grid
from fedtune.experiments.halving import rungs as rungs_of
from fedtune.experiments.halving import why_no_early_stop
from fedtune.experiments.sweep import Plan, Result, run_sweep
from fedtune.methods import ZEROTH_ORDER
from fedtune.run_folder import dated, replace_file


@dataclass(frozen=True)
class Effort:
    """How much is measured: directions and batches of slopes, or rounds at each rate. 0: by the size of the model."""

    directions: int
    batches: int
    repeats: int


OverOption = Annotated[
    list[str],
    typer.Option(
        "--over", "-o", metavar="KEY=VALUE,VALUE,...", help="A setting and the values to try; may be given again.",
        show_default=False,
    ),
]  # fmt: skip


def sweep(
    preset: PresetArgument,
    over: OverOption = [],  # noqa: B006 (typer reads the default and never changes it)
    settings: SetOption = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination, with seeds in a row.")] = 1,
    out: Annotated[
        str,
        typer.Option("--out", metavar="DIR", help="Folder of the runs [dim](default: runs/sweep-PRESET-DATE-TIME)[/dim]; "
                     "one that is there is carried on.", show_default=False),
    ] = "",
    workers: Annotated[int, typer.Option(min=0, help="Runs at a time; 0: one a GPU, or one a core.")] = 0,
    rungs: Annotated[int, typer.Option(min=1, help="Stages of early stop; 1: all combinations run all rounds.")] = 3,
    keep: Annotated[float, typer.Option(help="Share of the combinations that a stage carries on.")] = 0.5,
    measure: Annotated[bool, typer.Option("--measure", help="Only measure, and recommend an lr; no runs.")] = False,
    directions: Annotated[
        int,
        typer.Option(min=0, help="Directions along which slopes are measured (zeroth order), 2 at least; 0: 32, or down to 12 "
                     "on a large model, where 32 take long."),
    ] = 0,
    batches: Annotated[
        int, typer.Option(min=0, help="Batches measured along each direction, 2 at least; 0: 8, or down to 4 on a large model.")
    ] = 0,
    repeats: Annotated[
        int, typer.Option(min=0, help="Rounds measured at each rate (first order), 2 at least; 0: by the size of the model.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Results as the last line of stdout; progress on stderr.")] = False,
) -> None:  # fmt: skip
    """Try several values of settings, drop the worse ones early, and say which to use.

    [bold]fedtune sweep my.toml --measure[/bold]   a learning rate from slopes, or from single rounds at several rates; no run

    [bold]fedtune sweep my.toml --over lr=1e-5,3e-5,1e-4 --out runs/lr[/bold]   again the same line: carries it on

    [bold]fedtune sweep my.toml --over lr=1e-5,1e-4 --over K=1024,4096 --seeds 3 --set rounds=40[/bold]

    [bold]fedtune sweep my.toml --over eps=1e-4,5e-4 --over local_steps=50,200 --rungs 1[/bold]   without early stop

    All combinations run a quarter of the rounds, the better half of them half, and the better half of these all (--rungs,
    --keep). Every run is an ordinary run folder. docs/experiments.md explains the numbers.
    """
    screen = Screen(stderr=as_json)
    chosen = presets.choose(preset, settings)
    axes = [_axis(text) for text in over]
    effort = _effort(directions, batches, repeats)
    if measure:
        _only_measure(chosen.config, axes, effort, screen, as_json)
        return
    _refuse_twice(axes, settings)
    plan = _plan(chosen, axes, seeds, rungs, keep, out, screen)
    if chosen.config.algorithm in ZEROTH_ORDER and any(axis.key == "lr" for axis in axes):
        _measured(chosen.config, effort, screen)
    results = _run(plan, workers, screen)
    command = f"fedtune simulate {shlex.quote(preset)}" + "".join(f" --set {shlex.quote(text)}" for text in settings)
    replace_file(plan.out / "sweep.csv", csv_of(plan, results))
    screen.print(results_table(results))
    _say(screen, [*closing_lines(plan, results, command), f"Runs and sweep.csv: {plan.out}"])
    if as_json:
        print_json([as_mapping(plan, result) for result in results])
    if not any(not result.stopped for result in results):
        raise typer.Exit(1)


def _effort(directions: int, batches: int, repeats: int) -> Effort:
    for name, what, number in (
        ("directions", "direction", directions),
        ("batches", "batch", batches),
        ("repeats", "round", repeats),
    ):
        if number == 1:
            raise typer.BadParameter(f"--{name} takes 2 or more: one {what} says nothing of its noise")
    return Effort(directions, batches, repeats)


def _axis(text: str) -> Axis:
    """`lr=1e-5,3e-5` as a setting and its values."""
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not all(value.strip() for value in values.split(",")):
        raise typer.BadParameter(f"--over takes KEY=VALUE,VALUE,..., not '{text}'")
    return Axis(key.strip(), tuple(presets.parse_setting(f"{key}={value}")[1] for value in values.split(",")))


def _refuse_twice(axes: list[Axis], settings: list[str]) -> None:
    fixed = {presets.parse_setting(text)[0] for text in settings}
    for axis in axes:
        if axis.key in fixed:
            raise typer.BadParameter(f"'{axis.key}' is both in --set and in --over: leave one of them away")


def _plan(chosen: presets.Chosen, axes: list[Axis], seeds: int, rungs: int, keep: float, out: str, screen: Screen) -> Plan:
    config = chosen.config
    combinations = tuple(grid(config, axes))
    reason = next((why for one in combinations if (why := why_no_early_stop(one.settings))), "")
    if reason and rungs > 1:
        _say(screen, [reason])
    plan = Plan(
        combinations=combinations,
        seeds=tuple(range(config.seed, config.seed + seeds)),
        rungs=rungs_of(config.rounds, 1 if reason else rungs, keep),
        keep=keep,
        out=Path(out or dated(f"sweep-{chosen.label}")),
    )
    ends = ", ".join(map(str, plan.rungs))
    runs = f"{len(combinations)} combinations x {seeds} seeds" if seeds > 1 else f"{len(combinations)} combinations"
    _say(screen, [f"{runs}, compared after {ends} of {config.rounds} rounds, in {plan.out}"])
    return plan


def _run(plan: Plan, workers: int, screen: Screen) -> list[Result]:
    return run_sweep(plan, workers=workers, told=lambda progress: _say(screen, [progress_line(plan, progress)]))


def _only_measure(config: RunConfig, axes: list[Axis], effort: Effort, screen: Screen, as_json: bool) -> None:
    if axes:
        raise typer.BadParameter("--measure runs nothing, so there is nothing to sweep: leave --over or --measure away")
    found = _measured(config, effort, screen)
    if as_json:
        print_json(found)


def _measured(config: RunConfig, effort: Effort, screen: Screen) -> dict[str, object]:
    """Measure, print the recommendation, and return it as JSON types."""
    return _slopes(config, effort, screen) if config.algorithm in ZEROTH_ORDER else _range(config, effort, screen)


def _slopes(config: RunConfig, effort: Effort, screen: Screen) -> dict[str, object]:
    from fedtune.experiments.slopes import Points, advise

    screen.say("loading model and data", "dim")

    def say(points: Points, weights: int) -> None:
        screen.say(points_line(points, weights, asked=(effort.directions, effort.batches)), "dim")

    with saying_steps(screen):
        advice = advise(config, effort.directions, effort.batches, told=say)
    _say(screen, advice_lines(advice, config))
    return {**asdict(advice), "seen": advice.rate.seen, "largest": advice.rate.largest}


def _range(config: RunConfig, effort: Effort, screen: Screen) -> dict[str, object]:
    from fedtune.experiments.first_rounds import advise

    screen.say(f"measuring rounds at rates a factor of 3 apart, from the one next to {config.lr:g} on", "dim")
    with saying_steps(screen):
        advice = advise(config, effort.repeats, told=lambda one: screen.say(tried_line(one), "dim"))
    _say(screen, range_lines(advice, config))
    return range_json(advice)


def _say(screen: Screen, lines: list[str]) -> None:
    for line in lines:
        screen.say(line)
