"""`fedtune estimate`: memory, bytes and time of a run before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedtune.cli import presets
from fedtune.cli.numbers import in_bytes, in_ratio, in_time
from fedtune.cli.presets import PresetArgument, SetOption

if TYPE_CHECKING:
    from fedtune.config import RunConfig
    from fedtune.estimate import Estimate


def estimate(
    preset: PresetArgument,
    settings: SetOption = [],  # noqa: B006 (typer reads the default and never changes it)
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one line of JSON.")] = False,
) -> None:
    """Say what a run will need: parameters, memory, payload bytes and time, measured on two local steps of real data.

    [bold]fedtune estimate my.toml --set model=./Qwen3-0.6B --set local_steps=200[/bold]

    Nothing is written. Time is that of this machine, with clients one after another.
    """
    config = presets.choose(preset, settings).config
    console = Console(stderr=as_json, highlight=False)
    console.print("loading model and data, then timing local steps", style="dim")
    from fedtune.estimate import estimate_run

    found = estimate_run(config)
    if as_json:
        print(json.dumps(as_mapping(found)))
    else:
        console.print(_table(found, config))


def as_mapping(found: Estimate) -> dict[str, object]:
    """The estimate as JSON types, derived numbers included."""
    memory = {**asdict(found.memory), "zeroth_order": found.memory.zeroth_order, "first_order": found.memory.first_order}
    return {**asdict(found), "memory": memory, "payload": found.payload, "seconds": found.seconds}


def _table(found: Estimate, config: RunConfig) -> Table:
    memory, first_order = found.memory, config.algorithm == "ferret"
    mine, other = (memory.first_order, memory.zeroth_order) if first_order else (memory.zeroth_order, memory.first_order)
    rows = [
        ("parameters", f"{found.parameters:,}", ""),
        (
            "memory, weights and base",
            in_bytes(memory.weights + memory.base),
            "the live model, and the one that rebuilds start from",
        ),
    ]
    if first_order:
        rows.append(("memory, gradients", in_bytes(memory.gradients), f"and {in_bytes(memory.saved)} of activations"))
    else:
        rows.append(("memory, scratch", in_bytes(memory.scratch), "one module's perturbed weights"))
    rows += [
        ("memory, peak", in_bytes(mine), f"a {'zeroth' if first_order else 'first'}-order client would need {in_bytes(other)}"),
        ("up, client and round", in_bytes(found.up), ""),
        ("down, client and round", in_bytes(found.down), "at most; early rounds send less"),
        ("payload, whole run", in_bytes(found.payload), f"{found.client_rounds} client-rounds"),
        ("FedAvg, the same rounds", in_bytes(found.fedavg), f"{in_ratio(found.fedavg / found.payload)} as much"),
        ("time, local step", in_time(found.step_seconds), ""),
        (
            "time, client and round",
            in_time(found.local_steps * found.step_seconds + found.client_seconds),
            f"{found.local_steps} steps",
        ),
        ("time, evaluation", in_time(found.evaluation_seconds), f"{found.evaluations} times, generation not included"),
        ("time, whole run", in_time(found.seconds), "clients one after another"),
    ]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="bold")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    return table
