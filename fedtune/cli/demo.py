"""`fedtune demo`: FedKSeed and Ferret on the model and the tasks that ship with fedtune, side by side."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from fedtune.cli import presets
from fedtune.cli.simulate import Engine, JsonOption, OutOption, QuietOption, run_folder, run_watched, runner
from fedtune.cli.tables import Summary, comparison_table
from fedtune.run_folder import check_new

PRESETS = ("demo_fedkseed", "demo_ferret")


def demo(out: OutOption = "", as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Run both algorithms on a small model that ships with fedtune, on a CPU in about a minute, and compare them.

    [bold]fedtune demo --out runs/first[/bold] writes runs/first/demo_fedkseed and runs/first/demo_ferret.
    """
    configs = []
    for name in PRESETS:
        chosen = presets.choose(name)
        configs.append(chosen.config.replace(out=str(Path(out) / name) if out else run_folder(chosen)))
        check_new(configs[-1].out)
    console = Console(stderr=as_json, highlight=False)
    summaries: dict[str, Summary] = {}
    for name, config in zip(PRESETS, configs, strict=True):
        if not quiet:
            console.print(f"\n{name}", style="bold", markup=False)
        summaries[name] = run_watched(config, runner(Engine.in_process), quiet=quiet, to_stderr=as_json)
    if not (as_json and quiet):
        console.print()
        console.print(comparison_table(summaries))
        console.print(f"\nRun folders: {', '.join(config.out for config in configs)}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(summaries))
