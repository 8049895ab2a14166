"""`fedtune simulate`: run a preset on this machine, in this process or through Flower, and say what came of it."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from enum import StrEnum
from typing import Annotated, cast

import click
import typer

from fedtune.cli import presets
from fedtune.cli.presets import SetOption
from fedtune.cli.screen import Screen, print_json
from fedtune.cli.tables import Summary, result_table
from fedtune.cli.watch import watching
from fedtune.config import RunConfig
from fedtune.errors import Interrupted, UnchangedError
from fedtune.progress import Event, Note, listening
from fedtune.report.trackers import Tracker, tracking
from fedtune.resume import held_against, stored_settings
from fedtune.run_folder import RunFolder, check_new, dated
from fedtune.trust import said_now


class Engine(StrEnum):
    """What carries the messages between server and clients."""

    in_process = "in-process"
    flower = "flower"


OutOption = Annotated[
    str,
    typer.Option("--out", metavar="DIR", help="Run folder [dim](default: runs/PRESET-DATE-TIME)[/dim].", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as the last line of stdout; progress on stderr.")]
ResumeOption = Annotated[
    str,
    typer.Option(
        "--resume",
        metavar="RUN",
        help="Carry on the run in this folder, with its settings; no PRESET then.",
        show_default=False,
        is_eager=True,  # so that it is known when PRESET is checked
    ),
]


def _preset_or_resume(context: typer.Context, preset: str) -> str:
    """One of the two has to be there."""
    resume = context.params.get("resume")
    if not preset and not resume:
        raise click.MissingParameter("Give a preset, or --resume RUN.", ctx=context, param_type="argument", param_hint="PRESET")
    if preset and resume:
        raise typer.BadParameter("--resume goes on with the run's own settings: leave PRESET away, or use --set.")
    return preset


OptionalPreset = Annotated[
    str,
    typer.Argument(
        metavar="PRESET",
        help="A TOML file, or a name from [bold]fedtune presets[/bold].",
        show_default=False,
        callback=_preset_or_resume,
    ),
]
TrackOption = Annotated[
    Tracker | None,
    typer.Option(
        "--track", help="Log every round there too, if its package is installed (docs/report.md).", show_default=False
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]


def simulate(
    preset: OptionalPreset = "",
    settings: SetOption = [],  # noqa: B006 (typer reads the default and never changes it)
    out: OutOption = "",
    engine: Annotated[
        Engine, typer.Option(help="One process, or Flower's own simulation with Ray (slower to start, parallel).")
    ] = Engine.in_process,
    workers: Annotated[int, typer.Option(min=0, help="Parallel clients of --engine flower; 0: as many as fit.")] = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    resume: ResumeOption = "",
    track: TrackOption = None,
) -> None:
    """Run a federation on this machine: server and clients, one preset.

    [bold]fedtune simulate demo_ferret[/bold]

    [bold]fedtune simulate demo_fedkseed --set rounds=3 --set K=256 --out runs/try[/bold]

    [bold]fedtune simulate my.toml --set model=./Qwen3-0.6B --set data=rows.jsonl --engine flower --workers 4[/bold]

    [bold]fedtune simulate --resume runs/try --set rounds=20[/bold]

    [bold]fedtune simulate demo_ferret --track tensorboard --out runs/seen[/bold]   then tensorboard --logdir runs/seen

    Ctrl-C stops after the step in hand; what is finished stays in the run folder, and --resume carries the run on. A run
    whose model is still the base model at its end, since no update was usable, exits with 1.
    """
    config = _carried_on(resume, settings, out, quiet) if resume else _new(preset, settings, out)
    problem = None
    try:
        with tracking(track, config) if track else nullcontext():
            summary = run_watched(config, runner(engine, workers), quiet=quiet, to_stderr=as_json)
    except UnchangedError as error:  # the run has an end and a summary, which say nothing of success
        summary, problem = RunFolder.open(config.out).summary(), error
    if not (as_json and quiet):
        Screen(stderr=as_json).print(result_table(summary))
    if as_json:
        print_json(summary)
    if problem:
        raise problem


def _new(preset: str, settings: list[str], out: str) -> RunConfig:
    chosen = presets.choose(preset, settings)
    config = chosen.config.replace(out=run_folder(chosen, out))
    check_new(config.out)
    return config


def _carried_on(resume: str, settings: list[str], out: str, quiet: bool) -> RunConfig:
    """The settings of the run in the folder `resume`, changed by `settings` where that is allowed."""
    if out:
        raise typer.BadParameter("--resume goes on in the run's own folder: leave --out away.")
    folder = RunFolder.open(resume)
    before, told = stored_settings(folder), list[Event]()
    with listening(told.append):
        asked = said_now(before, dict(presets.parse_setting(text) for text in settings))
    going_on = held_against(folder, before, asked)
    notes = [event.text for event in told if isinstance(event, Note)]
    for note in () if quiet else (*notes, *going_on.unused):
        Screen(stderr=True).say(note)
    return going_on.config.replace(resume=resume)


def run_folder(chosen: presets.Chosen, out: str = "") -> str:
    """Where the run goes: `out`, or the preset's own `out`, or runs/PRESET-DATE-TIME."""
    return out or chosen.config.out or dated(chosen.label)


def run_watched(config: RunConfig, run: Callable[[RunConfig], Summary], *, quiet: bool, to_stderr: bool) -> Summary:
    """Run `config` under the eyes of the user. Raises Interrupted, saying how far the run came and where that is."""
    with watching(quiet=quiet, to_stderr=to_stderr) as view:
        try:
            return run(config)
        except Interrupted:
            done = sum(row.round > 0 for row in view.rows)
            kept = (
                f"after {done} of {config.rounds} rounds; model and metrics are in '{config.out}', and "
                f"`fedtune simulate --resume {shlex.quote(config.out)}` carries it on"
                if view.rows
                else "before the first round"
            )
            raise Interrupted(f"Stopped {kept}.", rounds=done, out=config.out) from None


def runner(engine: Engine, workers: int = 0) -> Callable[[RunConfig], Summary]:
    """The function that runs a config to its end on `engine`, from the package `simulations` (loaded only here)."""
    if engine is Engine.flower:
        run_flower = importlib.import_module("simulations.engines.flower").run_flower
        return lambda config: cast(Summary, run_flower(config, workers))
    return cast(Callable[[RunConfig], Summary], importlib.import_module("simulations.engines.in_process").run_in_process)
