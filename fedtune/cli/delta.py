"""`fedtune delta show`: what is in a file of kilobytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedtune.cli.numbers import in_bytes
from fedtune.cli.screen import Screen, print_json

if TYPE_CHECKING:
    from fedtune.comparison import Comparison

delta_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look at models of kilobytes.")

MOST_ROWS = 40  # lines of the table of pools


@delta_app.command("show")
def show(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The delta.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead.")] = False,
) -> None:
    """Show which base a delta needs, what its coefficients are, and how far each pool moves the weights.

    [bold]fedtune delta show tuned.safetensors[/bold]

    The file is checked as a whole; the base model is not needed.
    """
    from fedtune.comparison import compare
    from fedtune.delta_reader import read

    delta = read(Path(file))
    found = compare(delta, delta)
    if as_json:
        print_json(_facts(found))
        return
    screen = Screen()
    grid = Table.grid(padding=(0, 2))
    for title, value in _facts(found).items():
        text = in_bytes(found.bytes_a) if title == "bytes" else f"{value:.4g}" if isinstance(value, float) else str(value)
        grid.add_row(title.replace("_", " "), text)
    screen.print(grid)
    if delta.pools:
        screen.print(_pools(found))
    if len(delta.pools) > MOST_ROWS:
        screen.say(f"and {len(delta.pools) - MOST_ROWS} more pools", "dim")


def _facts(found: Comparison) -> dict[str, object]:
    delta = found.a
    return {
        "base": delta.base,
        "fingerprint": delta.fingerprint.hex(),
        "dtype": delta.dtype,
        "digest": delta.digest.hex(),
        "round": delta.round,
        "fedtune": delta.program,
        "family": delta.family + (f" of rank {delta.rank}" if delta.family == "lowrank" else ""),
        "K": delta.size,
        "blocks": len(delta.block_sizes),
        "block_rule": delta.block_rule,
        "parameters": sum(delta.block_sizes),
        "pools": len(delta.pools),
        "bytes": found.bytes_a,
        "norm": found.whole.norm_a,
    }


def _pools(found: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("pool", "rounds", "moved", "not zero"):
        table.add_column(name, justify="right")
    for pool, coefficients in list(zip(found.pools, found.a.pools, strict=True))[:MOST_ROWS]:
        used = f"{int((coefficients.q != 0).sum())} of {coefficients.q.size}"
        table.add_row(str(pool.number), in_rounds(pool.rounds), f"{pool.whole.norm_a:.4g}", used)
    return table


def in_rounds(rounds: tuple[int, int]) -> str:
    """A range of rounds: 3, or 1-20."""
    return f"{rounds[0]}-{rounds[1]}" if rounds[1] > rounds[0] else str(rounds[0])
