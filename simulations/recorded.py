"""Our runs at the settings of the recorded official runs, several seeds each, as one table beside the official figures.

    python -m simulations.recorded --seeds 3 --out runs/recorded

runs the presets stories_fedkseed, stories_fedkseed_pro and stories_ferret in this process (FEDTUNE_SHARED says where model
and data are) and prints held-out loss (mean over samples), seconds, payload bytes and digests. Runs that are in the
folder already are read, not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune import resident
from fedtune.cli import presets
from fedtune.cli.watch import watching
from fedtune.run_folder import RunFolder
from simulations.engines.in_process import run_in_process


@dataclass(frozen=True)
class Official:
    """The official code on CPU, float32, 2 cores: final loss of its recorded run, and the target for our mean."""

    loss: float
    target: float
    seconds: float


OFFICIAL = {
    "stories_fedkseed": Official(4.687, 4.74, 292.0),
    "stories_fedkseed_pro": Official(4.668, 4.74, 292.0),
    "stories_ferret": Official(4.195, 4.21, 405.0),
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each preset, with seeds 0, 1, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/recorded"), help="folder of the run folders")
    parser.add_argument("--only", choices=sorted(OFFICIAL), help="one preset")
    asked = parser.parse_args()
    names = [asked.only] if asked.only else list(OFFICIAL)
    table = {name: [_summary(name, seed, asked.out) for seed in range(asked.seeds)] for name in names}
    print("\n| preset | base | final, mean (each) | official | seconds, mean | official | bytes up, down a client and round |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in table.items():
        print(_row(name, runs))
    for name, runs in table.items():
        print(f"{name}: digests {', '.join(str(run['digest']) for run in runs)}")


def _summary(name: str, seed: int, out: Path) -> dict[str, Any]:
    folder = out / f"{name}-{seed}"
    if (folder / "summary.json").exists():
        return RunFolder.open(folder).summary()
    config = presets.choose(name).config.replace(seed=seed, out=str(folder))
    resident.release()
    print(f"\n{name}, seed {seed}", flush=True)
    with watching():
        return run_in_process(config)


def _row(name: str, runs: list[dict[str, Any]]) -> str:
    official = OFFICIAL[name]
    losses = [float(run["final_loss_sample_mean"]) for run in runs]
    seconds = statistics.mean(float(run["seconds"]) for run in runs)
    up = statistics.mean(float(run["payload_bytes_up_per_client_round"]) for run in runs)
    down = statistics.mean(float(run["payload_bytes_down_per_client_round"]) for run in runs)
    each = ", ".join(f"{loss:.3f}" for loss in losses)
    verdict = "reached" if statistics.mean(losses) <= official.target else "missed"
    return (
        f"| {name} | {runs[0]['initial_loss_sample_mean']:.3f} | {statistics.mean(losses):.3f} ({each}); target "
        f"{official.target} {verdict} | {official.loss} | {seconds:.0f} | {official.seconds:.0f} | {up:,.0f}, {down:,.0f} |"
    )


if __name__ == "__main__":
    main()
