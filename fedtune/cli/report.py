"""`fedtune report`: a run, or several beside one another, as a page that any browser shows without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.screen import Screen
from fedtune.numbers import in_bytes


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.", show_default=False)
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out", metavar="FILE", help="The page [dim](default: RUN/report.html, or report.html)[/dim].", show_default=False
        ),
    ] = "",
) -> None:
    """Write a page: curves, clients, bytes and seconds by round, responses before and after, settings, versions, digests.

    [bold]fedtune report runs/demo_ferret-20250101-120000[/bold]

    [bold]fedtune report runs/first runs/second --out both.html[/bold]

    One file without scripts that loads nothing, for screens, phones and paper. A run that goes on, was stopped or failed has
    one too, and it says so. The page quotes held-out prompts and responses: show it to whom you would show them.
    """
    from fedtune.report.page import report as write

    made = write(runs, Path(out) if out else None)
    Screen().say(f"'{made}': {in_bytes(made.stat().st_size)}")
