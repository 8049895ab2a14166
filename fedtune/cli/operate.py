"""`fedtune status`, `pause`, `unpause`, `stop`, `drop` and `evaluate`: a run that goes on, seen and told from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from fedtune.cli.ledger_rounds import RunArgument
from fedtune.cli.numbers import in_bytes, in_loss, in_time
from fedtune.cli.rows import real
from fedtune.cli.screen import Screen, print_json
from fedtune.control import Command, Order, said, send, waiting
from fedtune.divergence import first_divergence
from fedtune.errors import ControlError
from fedtune.ledger import Ledger
from fedtune.resume import settings_of
from fedtune.run_folder import RunFolder

JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON instead.")]


def status(run: RunArgument, as_json: JsonOption = False) -> None:
    """Say how far a run is, whether it goes on, and what it was told; works while it runs and after it died.

    [bold]fedtune status runs/demo_ferret-20250101-120000[/bold]
    """
    found = _status(RunFolder.open(run))
    if as_json:
        print_json(found)
        return
    screen = Screen()
    for name, text in _lines(found):
        screen.say(f"{name:<16}{text}")


def pause(run: RunArgument) -> None:
    """Have a run wait after the round in hand; [bold]fedtune unpause[/bold] lets it go on."""
    _tell(run, Order(Command.PAUSE))


def unpause(run: RunArgument) -> None:
    """Let a paused run go on."""
    _tell(run, Order(Command.UNPAUSE))


def stop(run: RunArgument) -> None:
    """End a run after the round in hand and keep its state; --resume carries it on."""
    _tell(run, Order(Command.STOP))


def drop(
    run: RunArgument,
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="Its id in the ledger.", show_default=False)],
) -> None:
    """Ask a client no more, from the next round on; of a run that is not going on, when it is resumed."""
    known = _check_drop(RunFolder.open(run), client)
    _tell(run, Order(Command.DROP, client))
    if not known:
        text = (
            f"No round has asked a client {client!r} so far: if the run does not know it either, `fedtune status` will say so."
        )
        Screen(stderr=True).say(text)


def _check_drop(folder: RunFolder, client: str) -> bool:
    """Whether a round has asked `client`. Raises ControlError if it is out already, or the last one."""
    with Ledger.open(folder.path) as ledger:
        dropped = {event.detail["client"] for event in ledger.events("drop")}
        asked = {name for row in ledger.rounds() for name in row.clients}
        clients = settings_of(ledger).clients
    if client in dropped:
        raise ControlError(f"Client {client!r} was dropped before: nothing is left to do.")
    if len(dropped) + 1 >= clients and not asked - dropped - {client}:
        raise ControlError(f"Client {client!r} is the last one: `fedtune stop` ends the run instead.")
    return client in asked


def evaluate(run: RunArgument) -> None:
    """Have a run measure the held-out loss after the round in hand, whatever eval_every is."""
    _tell(run, Order(Command.EVALUATE))


def _tell(run: str, order: Order) -> None:
    send(RunFolder.open(run), order)
    what = f"{order.command} client {order.client}" if order.client else str(order.command)
    Screen().say(f"The run will {what} between two rounds; `fedtune status {run}` shows it.")


def _status(folder: RunFolder) -> dict[str, Any]:
    """Everything that the ledger and status.json know about now."""
    with Ledger.open(folder.path) as ledger, ledger.at_one_moment():
        row, used, events = ledger.round(ledger.last), ledger.header.used, list(ledger.events())
        trained = [(one.number, one.train_loss) for one in ledger.rounds()]
    evaluations = [event.detail for event in events if event.kind == "evaluation"]
    changed = {key: value for event in events if event.kind == "resume" for key, value in event.detail["settings"].items()}
    now = said(folder)
    return {
        "doing": now.get("doing", "unknown"),
        "error": now.get("error", ""),
        "pid": now.get("pid"),
        "host": now.get("host"),
        "said_at": now.get("at"),
        "algorithm": used.get("algorithm"),
        "round": row.number,
        "rounds": changed.get("rounds", used.get("rounds")),
        "digest": row.state.hex(),
        "clients": list(row.clients),
        "refused": dict(row.refused),
        "dropped": [event.detail["client"] for event in events if event.kind == "drop"],
        "first_loss": real(evaluations[0], "eval_loss") if evaluations else None,
        "last_loss": real(evaluations[-1], "eval_loss") if evaluations else None,
        "last_accuracy": real(evaluations[-1], "accuracy") if evaluations else None,
        "last_loss_round": evaluations[-1]["round"] if evaluations else None,
        "warning": _warning(trained, {event["round"]: event for event in evaluations}),
        "bytes_up": row.total.payload_up,
        "bytes_down": row.total.payload_down,
        "elapsed": max([row.elapsed, *(event.elapsed for event in events)]),
        "resumes": sum(event.kind == "resume" for event in events),
        "commands": [dict(event.detail) for event in events if event.kind == "command"],
        "waiting": sum(1 for _ in waiting(folder)),
    }


def _warning(trained: Sequence[tuple[int, float | None]], evaluations: Mapping[int, Mapping[str, Any]]) -> str:
    """What the run warned of, or will when its evaluation is written down; "" for nothing."""
    rows = ({**evaluations.get(number, {}), "round": number, "train_loss": loss} for number, loss in trained)
    return str(first_divergence(list(rows)) or "")


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    error = f": {found['error']}" if found["error"] else ""
    refused = "; ".join(f"client {client}: {why}" for client, why in found["refused"].items())
    first, last = in_loss(found["first_loss"]), in_loss(found["last_loss"])
    accuracy = f", accuracy {in_loss(found['last_accuracy'])}" if found["last_accuracy"] is not None else ""
    lines = [
        ("run", f"{found['doing']}{error}"),
        ("round", f"{found['round']} of {found['rounds']} ({found['algorithm']}), digest {found['digest']}"),
        ("held-out loss", f"{first}, {last} after round {found['last_loss_round']}{accuracy}"),
        *([("warning", found["warning"])] if found["warning"] else []),
        ("last round", f"clients {' '.join(found['clients']) or '-'}; refused: {refused or 'none'}"),
        ("its payload", f"{in_bytes(found['bytes_up'])} up, {in_bytes(found['bytes_down'])} down"),
        ("time", f"{in_time(found['elapsed'])}, resumed {found['resumes']} times"),
        ("process", f"{found['pid']} on {found['host']}, at {found['said_at']}"),
    ]
    if found["dropped"]:
        lines.append(("dropped", " ".join(found["dropped"])))
    if found["commands"] or found["waiting"]:
        last = json.dumps(found["commands"][-1]) if found["commands"] else "none yet"
        lines.append(
            ("commands", f"{len(found['commands'])} followed or refused, {found['waiting']} waiting; the last: {last}")
        )
    return lines
