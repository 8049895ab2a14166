"""`fedtune data show`: what a client trains on, before it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedtune.cli import presets
from fedtune.cli.presets import PresetArgument, SetOption
from fedtune.cli.screen import Screen, quoted

if TYPE_CHECKING:
    from rich.text import Text

    from fedtune.data.federated import DataReport, Lengths

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look at the data before training on it.")

OPEN, CLOSE = "[[", "]]"  # around trained tokens where there is no colour
MOST_CLIENTS = 40  # lines of the table of clients
MOST_CATEGORIES = 20  # columns of it; with more, a client's only category, or how many it has


@data_app.command("show")
def show(
    preset: PresetArgument,
    settings: SetOption = [],  # noqa: B006 (typer reads the default and never changes it)
    client: Annotated[int, typer.Option("--client", min=0, help="Whose samples to show.")] = 0,
    samples: Annotated[int, typer.Option("--samples", min=0, help="How many of them.")] = 2,
) -> None:
    """Show what is trained on: rendered samples with the trained tokens marked, and who has how much of what.

    [bold]fedtune data show demo_ferret --client 3 --samples 1[/bold]

    [bold]fedtune data show my.toml --set data=rows.jsonl --set partition=dirichlet[/bold]
    """
    config = presets.choose(preset, settings).config
    if client >= config.clients:
        raise typer.BadParameter(f"--client {client}: clients are numbered from 0 to {config.clients - 1}")
    screen = Screen()
    screen.say("loading tokenizer and data", "dim")
    from fedtune.data.federated import describe, load_federated
    from fedtune.models import load_tokenizer

    tokenizer = load_tokenizer(config)
    data = load_federated(config, tokenizer)
    for number, encoded in enumerate(data.clients[client][:samples], start=1):
        trained = f"{encoded.response_length} of {len(encoded.input_ids)} tokens are trained on"
        screen.print()
        screen.say(f"client {client}, sample {number} (row {encoded.row}): {trained}", "bold")
        screen.print(marked(describe(encoded, tokenizer), colour=screen.color_system is not None), soft_wrap=True)
    screen.print()
    screen.print(clients_table(data.report))
    screen.print()
    _print_totals(screen, data.report)


def marked(pieces: Sequence[tuple[str, bool]], *, colour: bool) -> Text:
    """Text in which what is trained on stands out: green where there is colour, [[between brackets]] where there is none."""
    text = quoted("")
    for piece, trained in pieces:
        if colour:
            text.append_text(quoted(piece, "bold green" if trained else "dim"))
        else:
            text.append_text(quoted(f"{OPEN}{piece}{CLOSE}" if trained else piece))
    return text


def clients_table(report: DataReport) -> Table:
    """Samples of each client by category, and of the held-out set; at most MOST_CLIENTS clients."""
    everyone = [*report.clients, report.heldout]
    categories = sorted({category for counts in everyone for category in counts})
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("client")
    table.add_column("samples", justify="right")
    columns = [category or "(none)" for category in categories] if categories != [""] else []
    if len(columns) > MOST_CATEGORIES:
        table.add_column("categories")
    else:
        for column in columns:
            table.add_column(column, justify="right")

    def add(name: str, counts: Mapping[str, int]) -> None:
        if len(columns) > MOST_CATEGORIES:
            cells = [next(iter(counts)) if len(counts) == 1 else str(len(counts))]
        else:
            cells = [str(counts[category]) if counts.get(category) else "." for category in categories] if columns else []
        table.add_row(name, str(sum(counts.values())), *cells)

    for number, counts in enumerate(report.clients[:MOST_CLIENTS]):
        add(str(number), counts)
    if len(report.clients) > MOST_CLIENTS:
        table.add_row(f"... {len(report.clients) - MOST_CLIENTS} more")
    add("held out", report.heldout)
    return table


def _print_totals(screen: Screen, report: DataReport) -> None:
    kept = sum(sum(counts.values()) for counts in report.clients)
    lines = [
        f"{report.source}: {report.rows} rows, {kept} for training, {sum(report.heldout.values())} held out",
        f"dropped: {_reasons(report.dropped)}",
        f"responses cut at max_length: {report.truncated}",
        f"tokens, prompt and response: {_lengths(report.lengths)}; response alone: {_lengths(report.response_lengths)}",
    ]
    if report.heldout_dropped:
        lines.append(f"dropped from the held-out file: {_reasons(report.heldout_dropped)}")
    for line in [*lines, *report.notes]:
        screen.say(line)


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in dropped.items()) or "none"


def _lengths(lengths: Lengths) -> str:
    return f"{lengths.shortest} to {lengths.longest}, median {lengths.median:g}"
