"""A run as a table that grows on the terminal, with a bar for the local steps and the bytes so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

from fedtune.cli.lines import headline
from fedtune.cli.numbers import in_about, in_bytes, in_loss, in_ratio, in_time
from fedtune.cli.rows import RoundRow
from fedtune.cli.screen import plain
from fedtune.cli.view import RunView

Score = Callable[[RoundRow], float | None]
SCORES: tuple[tuple[str, Score], ...] = (("accuracy", lambda row: row.accuracy), ("ROUGE-L", lambda row: row.rouge_l))
"""Columns that are there where a round has measured them."""
FIXED_LINES = 12
"""Lines of the display besides the rounds: the rest of the terminal's height shows the latest rounds."""


class LiveRun:
    """Renders the current state of a view; rich's Live asks for it a few times a second."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Group(*self._parts(options.height or console.height))

    def _parts(self, height: int) -> list[RenderableType]:
        view = self._view
        parts: list[RenderableType] = []
        if view.started:
            parts.append(plain(headline(view.started), style="bold"))
        if view.rows:
            parts.append(round_table(view.rows, max(3, height - FIXED_LINES)))
        if not view.finished:
            parts.append(self._work())
        if view.stopping:
            parts.append(plain("stopping after the step in hand", style="yellow"))
        if view.rows:
            parts.append(self._bytes())
        return parts

    def _work(self) -> RenderableType:
        view = self._view
        done, total = view.steps
        left = view.seconds_left
        clock = in_about(view.elapsed) + (f", about {in_about(left)} left" if left is not None else "")
        if not total:
            return plain(f"{view.doing} ({clock})", style="cyan")
        line = Table.grid(padding=(0, 2))
        line.add_row(
            ProgressBar(total=total, completed=done, width=24), plain(view.doing, style="cyan"), plain(clock, style="dim")
        )
        return line

    def _bytes(self) -> RenderableType:
        view = self._view
        if not view.payload:
            return plain("")
        ratio = in_ratio(view.fedavg / view.payload)
        return plain(f"payload so far {in_bytes(view.payload)}; FedAvg {in_bytes(view.fedavg)} ({ratio})", style="green")


def round_table(rows: Sequence[RoundRow], most: int) -> Table:
    """The rounds as a table: the base model and at most `most` of the latest rounds."""
    scores = [(name, score) for name, score in SCORES if any(score(row) is not None for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("round", "clients", "train loss", "held-out loss"):
        table.add_column(name, justify="right")
    for name, _ in scores:
        table.add_column(name, justify="right")
    for name in ("up/client", "down/client", "time"):
        table.add_column(name, justify="right")
    first, rest = rows[:1], rows[1:]
    read = [score for _, score in scores]
    for row in first:
        table.add_row(*_cells(row, read))
    if len(rest) > most:
        table.add_row("...", style="dim")
        rest = rest[-most:]
    for row in rest:
        table.add_row(*_cells(row, read))
    return table


def _cells(row: RoundRow, scores: Sequence[Score]) -> list[str]:
    base = row.round == 0
    refused = f" ({row.refused} refused)" if row.refused else ""
    return [
        "base" if base else str(row.round),
        "" if base else f"{row.clients}{refused}",
        "" if base else in_loss(row.train_loss),
        "" if row.eval_loss is None else in_loss(row.eval_loss),
        *("" if (value := score(row)) is None else in_loss(value) for score in scores),
        "" if base else in_bytes(row.up_per_client),
        "" if base else in_bytes(row.down_per_client),
        in_time(row.seconds),
    ]
