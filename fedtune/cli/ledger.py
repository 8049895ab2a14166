"""`fedtune ledger`: the commands on what runs have written down; `diff` compares two models over one base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedtune.cli.delta import MOST_ROWS, in_rounds
from fedtune.cli.ledger_rounds import show, verify
from fedtune.cli.numbers import in_bytes
from fedtune.cli.screen import Screen, print_json
from fedtune.cli.watch import saying_notes

if TYPE_CHECKING:
    from fedtune.comparison import Comparison, Difference

ledger_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look at what runs have written down.")
ledger_app.command("show")(show)
ledger_app.command("verify")(verify)

PlaceArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder or a delta.", show_default=False)]


@ledger_app.command("diff")
def diff(
    a: PlaceArgument,
    b: PlaceArgument,
    by_block: Annotated[bool, typer.Option("--blocks", help="A line for each block of parameters too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead.")] = False,
) -> None:
    """Compare two models over one base: cosine and norms of their changes, pool by pool (a range of rounds each), and bytes.

    [bold]fedtune ledger diff runs/first runs/second[/bold]

    [bold]fedtune ledger diff theirs.safetensors runs/ours --blocks[/bold]

    Norms are of the change of the weights, expected over directions; two pools of other seeds count as orthogonal.
    """
    from fedtune.comparison import compare, delta_at

    with saying_notes(Screen(stderr=True)):
        found = compare(delta_at(Path(a)), delta_at(Path(b)))
    if as_json:
        print_json(_as_json(found))
        return
    screen = Screen()
    for title, delta, size in (("A", found.a, found.bytes_a), ("B", found.b, found.bytes_b)):
        of = f"'{delta.base}' after round {delta.round}, digest {delta.digest.hex()}, {in_bytes(size)} as a delta"
        screen.say(f"{title}: {of}")
    screen.print(_table(found, by_block))
    if len(found.pools) > MOST_ROWS:
        screen.say(f"and {len(found.pools) - MOST_ROWS} more pools (--json has all)", "dim")


def _table(found: Comparison, by_block: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("pool", "rounds", "|A|", "|B|", "cosine", "|A - B|"):
        table.add_column(name, justify="right")
    table.add_row("all", "", *_cells(found.whole), style="bold")
    for pool in found.pools[:MOST_ROWS]:
        table.add_row(str(pool.number), in_rounds(pool.rounds), *_cells(pool.whole))
        for block, difference in enumerate(pool.blocks if by_block else ()):
            table.add_row(f"block {block}", "", *_cells(difference), style="dim")
    return table


def _cells(difference: Difference) -> tuple[str, str, str, str]:
    cosine = "-" if difference.cosine is None else f"{difference.cosine:.4f}"
    return f"{difference.norm_a:.4g}", f"{difference.norm_b:.4g}", cosine, f"{difference.distance:.4g}"


def _as_json(found: Comparison) -> dict[str, object]:
    return {
        "base": found.a.base,
        "fingerprint": found.a.fingerprint.hex(),
        "digests": [found.a.digest.hex(), found.b.digest.hex()],
        "rounds": [found.a.round, found.b.round],
        "bytes": [found.bytes_a, found.bytes_b],
        "whole": asdict(found.whole),
        "pools": [asdict(pool) for pool in found.pools],
    }
