"""`fedtune ledger show` and `fedtune ledger verify`: the rounds of a run, and whether they are what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from fedtune.cli.numbers import in_bytes, in_loss, in_time
from fedtune.cli.rows import real
from fedtune.cli.screen import Screen, print_json
from fedtune.ledger import Header, Ledger, Round
from fedtune.run_folder import RunFolder

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run folder.", show_default=False)]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="JSON lines instead.")]


def show(run: RunArgument, as_json: JsonLinesOption = False) -> None:
    """List the rounds of a run: participants, what was refused, bytes, losses; also while the run goes on.

    [bold]fedtune ledger show runs/demo_ferret-20250101-120000[/bold]
    """
    with Ledger.open(RunFolder.open(run).path) as ledger, ledger.at_one_moment():
        header, rounds, events = ledger.header, list(ledger.rounds()), list(ledger.events())
    details = {event.detail["round"]: event.detail for event in events if event.kind == "evaluation"}
    losses, accuracies = ({at: real(of, key) for at, of in details.items()} for key in ("eval_loss", "accuracy"))
    if as_json:
        for row in rounds:
            scores = {"eval_loss": losses.get(row.number), "accuracy": accuracies.get(row.number)}
            print_json({**asdict(row), "state": row.state.hex(), **scores})
        return
    screen = Screen()
    screen.say(_headline(header))
    screen.print(_table(rounds, losses))
    for event in events:
        if event.kind not in ("evaluation", "keys"):  # the table shows the losses, and keys are for the server
            screen.say(f"after round {event.round}: {event.kind} {_detail(event.detail)}")


def verify(run: RunArgument) -> None:
    """Check that a run's ledger is what was written: every digest, and every update once more to the same model.

    [bold]fedtune ledger verify runs/demo_ferret-20250101-120000[/bold]

    Needs neither the base model nor a client. Exit code 1, and the first bad row, if anything differs.
    """
    from fedtune.verify import verify as check

    with Ledger.open(RunFolder.open(run).path) as ledger:
        found = check(ledger)
    lead = "that lead to the same digests" if found.replayed else "of which not all were kept, so none was replayed"
    Screen().say(
        f"The ledger is as it was written: {found.rounds} rounds, {found.updates} updates {lead}, "
        f"{found.events} events, {found.pools} finished pools. Digest of the model: {found.digest}"
    )


def _headline(header: Header) -> str:
    used = header.used
    return (
        f"{used.get('algorithm')}, model '{used.get('model')}' ({header.fingerprint.hex()}), begun {header.created} "
        f"with fedtune {header.versions.get('fedtune')}"
    )


def _table(rounds: list[Round], losses: Mapping[int, float | None]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("round", "used", "refused", "train loss", "held-out loss", "up", "down", "time", "digest"):
        table.add_column(name, justify="left" if name in ("used", "refused", "digest") else "right")
    for row in rounds:
        used = [client for client in row.clients if client not in row.refused]
        table.add_row(
            "base" if row.number == 0 else str(row.number),
            " ".join(used),
            " ".join(row.refused),
            in_loss(row.train_loss),
            in_loss(losses.get(row.number)),
            in_bytes(row.total.payload_up),
            in_bytes(row.total.payload_down),
            in_time(sum(row.seconds.values())),
            row.state.hex()[:8],
        )
    return table


def _detail(detail: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in detail.items() if key != "versions"}, ensure_ascii=False)
