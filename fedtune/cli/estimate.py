"""`fedtune estimate`: memory, bytes and time of a run before it starts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedtune.beside import LARGE
from fedtune.cli import presets
from fedtune.cli.numbers import in_bytes, in_ratio, in_time
from fedtune.cli.presets import PresetArgument, SetOption
from fedtune.cli.screen import Screen, print_json

TableRow = tuple[str, str, str]

if TYPE_CHECKING:
    from fedtune.config import RunConfig
    from fedtune.needs import Needs


def estimate(
    preset: PresetArgument,
    settings: SetOption = [],  # noqa: B006 (typer reads the default and never changes it)
    meta: Annotated[
        bool, typer.Option("--meta", help="From the model's config.json alone: no weights, no data, no time.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one line of JSON.")] = False,
) -> None:
    """Say what a run will need: parameters, memory, payload bytes and time, measured on two local steps of real data.

    [bold]fedtune estimate my.toml --set model=./Qwen3-0.6B --set local_steps=200[/bold]

    [bold]fedtune estimate papers/fedkseed_ni_3b --meta[/bold]

    Nothing is written. Time is that of this machine, with clients one after another.
    """
    config = presets.choose(preset, settings).config
    screen = Screen(stderr=as_json)
    found = _of_architecture(config, screen) if meta else _of_run(config, screen)
    if as_json:
        print_json(as_mapping(found))
    else:
        screen.print(_table(found, config))


def _of_run(config: RunConfig, screen: Screen) -> Needs:
    screen.say("loading model and data, then timing local steps", "dim")
    from fedtune.estimate import estimate_run

    return estimate_run(config)


def _of_architecture(config: RunConfig, screen: Screen) -> Needs:
    from fedtune.architecture import architecture_folder, needs_of_architecture

    place = architecture_folder(config)
    screen.say(f"from {place}/config.json, for samples of {config.max_length} tokens", "dim")
    return needs_of_architecture(config)


def as_mapping(found: Needs) -> dict[str, object]:
    """The estimate as JSON types, derived numbers included; without times if none were measured."""
    from fedtune.estimate import Estimate

    memory = {**asdict(found.memory), "zeroth_order": found.memory.zeroth_order, "first_order": found.memory.first_order}
    derived = {"seconds": found.seconds, "peak": found.peak} if isinstance(found, Estimate) else {}
    return {**asdict(found), "memory": memory, "payload": found.payload, "disk": found.disk, **derived}


def _table(found: Needs, config: RunConfig) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="bold")
    table.add_column(style="dim")
    for row in (*_memory_rows(found, config), *_byte_rows(found, config), *_time_rows(found)):
        table.add_row(*row)
    return table


def _memory_rows(found: Needs, config: RunConfig) -> list[TableRow]:
    memory, first_order = found.memory, config.first_order
    mine, other = (memory.first_order, memory.zeroth_order) if first_order else (memory.zeroth_order, memory.first_order)
    rows = [
        ("parameters", f"{found.parameters:,}", ""),
        ("memory, weights", in_bytes(memory.weights), "the base model is mapped from disk"),
    ]
    if memory.master:
        rows.append(("memory, master copy", in_bytes(memory.master), "float32, takes the local steps"))
    if first_order:
        rows.append(("memory, gradients", in_bytes(memory.gradients), f"and {in_bytes(memory.saved)} of activations"))
        if memory.optimizer:
            kept = "coordinates" if config.algorithm == "subspace" else f"{config.optimizer}, float32"
            rows.append(("memory, optimizer", in_bytes(memory.optimizer), kept))
    else:
        rows.append(("memory, scratch", in_bytes(memory.scratch), "one module's perturbed weights"))
    peak = f"a {'zeroth' if first_order else 'first'}-order client would need {in_bytes(other)}"
    return [*rows, ("memory, a client's work", in_bytes(mine), peak), *_peak_rows(found)]


def _peak_rows(found: Needs) -> list[TableRow]:
    """What was measured of the whole process."""
    from fedtune.estimate import Estimate

    if not isinstance(found, Estimate):
        return []
    parts = ", ".join(f"{kind} {in_bytes(size)}" for kind, size in found.peaks.items())
    return [
        ("memory, loaded", in_bytes(found.loaded), "libraries, model and data of this process, or of the GPU"),
        ("memory, peak", in_bytes(found.peak), parts),
    ]


def _byte_rows(found: Needs, config: RunConfig) -> list[TableRow]:
    down = (
        "a pool; a client gets all that it has not seen"
        if config.pool_every
        else "at most; early rounds, and clients asked lately, get less"
    )
    ratio = f"{in_ratio(found.fedavg / found.payload)} as much" if found.payload else ""
    return [
        ("up, client and round", in_bytes(found.up), ""),
        ("down, client and round", in_bytes(found.down), down),
        ("payload, whole run", in_bytes(found.payload), f"at most; {found.client_rounds} client-rounds"),
        ("FedAvg, the same rounds", in_bytes(found.fedavg), ratio),
        ("disk, run folder", in_bytes(found.disk), f"at most; {_disk_words(found)}"),
        *(
            [("disk, cache folder", in_bytes(found.cache), "of each process that trains (XDG_CACHE_HOME)")]
            if found.cache
            else []
        ),
    ]


def _disk_words(found: Needs) -> str:
    if found.updates_on_disk < found.client_rounds:
        return "the updates of a round go once it is written (keep_updates)"
    cheaper = "; less with keep_updates=false" if found.up > LARGE else ""
    return f"every update is kept, so that the run can be verified{cheaper}"


def _time_rows(found: Needs) -> list[TableRow]:
    from fedtune.estimate import Estimate

    if not isinstance(found, Estimate):
        return [("time", "unknown", "it is measured on real weights and data: run without --meta")]
    client = found.local_steps * found.step_seconds + found.client_seconds
    written: list[TableRow] = []
    if found.generations:
        written = [("time, generated texts", in_time(found.generation_seconds), f"{found.generations} times, at most")]
    return [
        ("time, local step", in_time(found.step_seconds), ""),
        ("time, client and round", in_time(client), f"{found.local_steps} steps"),
        ("time, evaluation", in_time(found.evaluation_seconds), f"{found.evaluations} times"),
        *written,
        ("time, whole run", in_time(found.seconds), "clients one after another"),
    ]
