"""`fedtune demo`: FedKSeed, Ferret and the subspace method on the model and the tasks that ship with fedtune, side by side."""

from __future__ import annotations

from pathlib import Path

from fedtune.cli import presets
from fedtune.cli.screen import Screen, print_json
from fedtune.cli.simulate import Engine, JsonOption, OutOption, QuietOption, run_folder, run_watched, runner
from fedtune.cli.tables import Summary, comparison_table
from fedtune.run_folder import check_new

PRESETS = ("demo_fedkseed", "demo_ferret", "demo_subspace")


def demo(out: OutOption = "", as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Run the three algorithms on a small model that ships with fedtune, on a CPU in a minute or two, and compare them.

    [bold]fedtune demo --out runs/first[/bold] writes runs/first/demo_fedkseed, demo_ferret and demo_subspace.
    """
    configs = []
    for name in PRESETS:
        chosen = presets.choose(name)
        configs.append(chosen.config.replace(out=str(Path(out) / name) if out else run_folder(chosen)))
        check_new(configs[-1].out)
    screen = Screen(stderr=as_json)
    summaries: dict[str, Summary] = {}
    for name, config in zip(PRESETS, configs, strict=True):
        if not quiet:
            screen.print()
            screen.say(name, "bold")
        summaries[name] = run_watched(config, runner(Engine.in_process), quiet=quiet, to_stderr=as_json)
    if not (as_json and quiet):
        screen.print()
        screen.print(comparison_table(summaries))
        screen.print()
        screen.say(f"Run folders: {', '.join(config.out for config in configs)}")
    if as_json:
        print_json(summaries)
