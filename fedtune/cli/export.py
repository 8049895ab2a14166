"""`fedtune export`: a finished (or stopped) run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedtune.cli.numbers import in_bytes
from fedtune.run_folder import RunFolder, check_new


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run folder.", show_default=False)],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The new folder.", show_default=False)],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Where the base model is now, if it moved.", show_default=False)
    ] = "",
    best: Annotated[bool, typer.Option("--best", help="The round with the lowest held-out loss instead of the last.")] = False,
) -> None:
    """Write the tuned model as a Hugging Face folder that AutoModelForCausalLM.from_pretrained loads.

    [bold]fedtune export runs/demo_ferret-20250101-120000 --out tuned[/bold]

    The model is rebuilt from the base model and the run's coefficients and checked against the run's digest.
    """
    folder = RunFolder.open(run)
    check_new(out)
    console = Console(highlight=False)
    console.print("rebuilding the model from base and coefficients", style="dim")
    from fedtune.export import BEST, FINAL, export_run

    done = export_run(folder, Path(out), BEST if best else FINAL, model)
    for line in (
        f"'{done.folder}': the model after round {done.round}, {in_bytes(done.bytes)}, digest {done.digest}",
        f'AutoModelForCausalLM.from_pretrained("{done.folder}") loads it.',
    ):
        console.print(line, markup=False, soft_wrap=True)
