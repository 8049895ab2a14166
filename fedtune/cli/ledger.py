"""`fedtune ledger`: the commands on what runs have written down."""

from __future__ import annotations

import typer

from fedtune.cli.ledger_rounds import show, verify

ledger_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look at what runs have written down.")
ledger_app.command("show")(show)
ledger_app.command("verify")(verify)
