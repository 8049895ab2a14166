"""`fedtune worker`: the long-lived process of a node that owns the device; in the foreground, or what is there."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer

from fedtune.cli.numbers import in_time
from fedtune.cli.screen import Screen
from fedtune.errors import WorkerError
from fedtune.logs import begin

STOP_SECONDS = 30.0

AddressOption = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="unix:/PATH of a socket, or tcp:/PATH of a file with port and token "
        "[dim](default: where ClientApps of this user look for the device's worker)[/dim].",
        show_default=False,
    ),
]


def worker(
    address: AddressOption = "",
    device: Annotated[str, typer.Option(help="The setting `device` of the nodes that it serves.")] = "auto",
    idle: Annotated[float, typer.Option(min=0, help="Seconds without work after which it ends; 0: never.")] = 0.0,
    status: Annotated[bool, typer.Option("--status", help="Say which workers of this user are there, and stop.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the workers of this user, or the one at --address.")] = False,
) -> None:
    """Own a device for the nodes of this machine: the model stays loaded from one message to the next.

    A SuperNode needs none of this: its ClientApp starts a worker when there is none, and the worker ends after half an hour
    without work. Run one here to give it to a supervisor or to see what it does:

    [bold]fedtune worker --device cuda:0[/bold]   found by every node with device = "cuda:0"

    [bold]fedtune worker --address unix:/run/fedtune/gpu0.sock --device cuda:0[/bold]   for nodes that name this address

    [bold]fedtune worker --status[/bold]   [bold]fedtune worker --stop[/bold]

    A node chooses in its --node-config: worker="auto" (what a SuperNode does by itself), worker="off" (a model loaded for
    every message), or worker="unix:/run/fedtune/gpu0.sock". Socket and folder must be closed to other users.
    """
    address_of = importlib.import_module("client.address").Address
    if status or stop:
        found = [address_of.parse(address)] if address else addresses()
        (end if stop else show)(found)
        return
    begin()
    place = address_of.parse(address) if address else address_of.own(device)
    importlib.import_module("client.service").serve(place, device, idle)


def addresses() -> list[Any]:
    """The addresses of this user's workers that were ever started and may live."""
    module = importlib.import_module("client.address")
    kinds = {".sock": "unix", ".port": "tcp"}
    found = sorted(path for path in module.runtime_folder().glob("*") if path.suffix in kinds)
    return [module.Address(kinds[path.suffix], path) for path in found]


def show(found: list[Any]) -> None:
    """Print who is at the addresses."""
    greet = importlib.import_module("client.connection").greet
    there = [(address, said) for address in found if (said := greet(address)) is not None]
    for address, said in there:
        model = f"{said.model} on {said.placed}" if said.model else "none yet"
        Screen().say(str(address))
        Screen().say(f"  process   {said.pid}, fedtune {said.version}, up {in_time(said.uptime_seconds)}")
        Screen().say(f"  device    {said.device}")
        Screen().say(f"  model     {model} (loads: {said.loads})")
        Screen().say(f"  requests  {said.requests} done in {in_time(said.work_seconds)}, {said.busy} in hand")
    if not there:
        Screen().say("There is no worker.")


def end(found: list[Any]) -> None:
    """Stop who is at the addresses."""
    stop = importlib.import_module("client.connection").stop
    ended = [address for address in found if stop(address, STOP_SECONDS)]
    if not ended:
        raise WorkerError("There is no worker to stop.")
    for address in ended:
        Screen().say(f"stopped the worker at {address}")
