"""`fedtune export`: a finished (or stopped) run as a Hugging Face folder or as a file of kilobytes."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.numbers import in_bytes
from fedtune.cli.screen import Screen
from fedtune.cli.watch import saying_notes
from fedtune.run_folder import RunFolder, check_new


class Format(StrEnum):
    """What is written."""

    hf = "hf"
    delta = "delta"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run folder.", show_default=False)],
    out: Annotated[str, typer.Option("--out", metavar="PATH", help="The new folder or file.", show_default=False)],
    form: Annotated[
        Format, typer.Option("--format", help="A Hugging Face folder, or the coefficients alone, for `fedtune apply`.")
    ] = Format.hf,
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Where the base model is now, if it moved.", show_default=False)
    ] = "",
    revision: Annotated[
        str, typer.Option("--revision", help="Revision of a hub model given with --model.", show_default=False)
    ] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model.")
    ] = False,
    best: Annotated[bool, typer.Option("--best", help="The round with the lowest held-out loss instead of the last.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Also if no update has moved the model: the base.")] = False,
) -> None:
    """Write the tuned model as a Hugging Face folder that AutoModelForCausalLM.from_pretrained loads, or as a delta.

    [bold]fedtune export runs/demo_ferret-20250101-120000 --out tuned[/bold]

    [bold]fedtune export runs/demo_fedkseed-20250101-120000 --format delta --out tuned.safetensors[/bold]

    A folder is rebuilt from the base model and the run's coefficients and checked against the run's digest. A delta is a
    file of kilobytes; whoever has the base model makes the same weights of it with `fedtune apply`. A model that no update
    has moved is not written without --base.

    The run folder may be somebody else's: no code of its model runs and nothing is fetched from the hub unless you say so.
    """
    folder = RunFolder.open(run)
    check_new(out)
    screen = Screen()
    if form is Format.hf:
        screen.say("rebuilding the model from base and coefficients", "dim")
    from fedtune.export import FINAL, Base, export_delta, export_run
    from fedtune.run_folder import BEST

    write = export_run if form is Format.hf else export_delta
    with saying_notes(Screen(stderr=True)):
        done = write(folder, Path(out), BEST if best else FINAL, Base(model, revision, trust_remote_code), base)
    use = {
        Format.hf: f'AutoModelForCausalLM.from_pretrained("{done.path}") loads it.',
        Format.delta: f"`fedtune apply BASE {shlex.quote(str(done.path))} --out DIR` makes the model of it.",
    }
    for line in (
        f"'{done.path}': {done.what}, {in_bytes(done.bytes)}, digest {done.digest}",
        use[form],
    ):
        screen.say(line)
