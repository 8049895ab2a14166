"""Our runs at the settings of the recorded official runs, over seeds and families, as one table beside the official figures.

    python -m simulations.recorded --seeds 3                                  the README's table
    python -m simulations.recorded --seeds 5 --families hadamard,rademacher,gaussian --jobs 2 --final-only


runs the presets stories_fedkseed, stories_fedkseed_pro and stories_ferret (FEDTUNE_SHARED says where model and data are)
and prints the held-out loss (mean over samples of each sample's mean token loss) after the last round, seconds, payload
bytes and digests. Runs that are in the folder already are read, not repeated, so the command can be stopped at any time.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.run_folder import RunFolder


@dataclass(frozen=True)
class Official:
    """Final losses of the official code over its runs (CPU, float32), and the seconds of one run on 2 cores."""

    losses: tuple[float, ...]
    seconds: float


OFFICIAL = {
    "stories_fedkseed": Official((4.7032, 4.7019, 4.6545), 292.0),
    "stories_fedkseed_pro": Official((4.7019, 4.6340), 484.0),
    "stories_ferret": Official((4.1858, 4.2047, 4.1932), 405.0),
}


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    preset: str
    family: str

    def folder(self, out: Path, seed: int) -> Path:
        return out / f"{self.preset}-{self.family}-{seed}"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each line, with seeds 0, 1, ...")
    parser.add_argument("--families", default="hadamard", help="comma-separated")
    parser.add_argument("--presets", default=",".join(OFFICIAL), help="comma-separated")
    parser.add_argument("--final-only", action="store_true", help="no evaluation between the first and the last round")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; seconds mean most with 1")
    parser.add_argument("--out", type=Path, default=Path("runs/recorded"), help="folder of the run folders")
    asked = parser.parse_args()
    cells = [Cell(preset, family) for preset in asked.presets.split(",") for family in asked.families.split(",")]
    missing = [(cell, seed) for cell in cells for seed in range(asked.seeds) if not _done(cell, asked.out, seed)]
    with ThreadPoolExecutor(asked.jobs) as pool:
        for number, _ in enumerate(pool.map(lambda task: _run(*task, asked), missing), 1):
            print(f"{number} of {len(missing)} runs done", file=sys.stderr, flush=True)
    for line in table(cells, asked.out, range(asked.seeds)):
        print(line)


def _done(cell: Cell, out: Path, seed: int) -> bool:
    return (cell.folder(out, seed) / "summary.json").exists()


def _run(cell: Cell, seed: int, asked: argparse.Namespace) -> None:
    """One run in a process of its own, so that runs do not share a model."""
    settings = [f"seed={seed}", f"family={cell.family}", *(["eval_every=0"] if asked.final_only else [])]
    command = [
        sys.executable,
        "-m",
        "fedtune.cli",
        "simulate",
        cell.preset,
        "--quiet",
        "--out",
        str(cell.folder(asked.out, seed)),
    ]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def table(cells: Sequence[Cell], out: Path, seeds: range) -> Iterator[str]:
    """The lines of the Markdown table."""
    yield "| preset | family | before | after, mean ± sd (each seed) | official, mean ± sd | seconds | official | up, down |"
    yield "|---|---|---|---|---|---|---|---|"
    for cell in cells:
        yield _line(cell, [RunFolder.open(cell.folder(out, seed)).summary() for seed in seeds])


def _line(cell: Cell, runs: Sequence[dict[str, Any]]) -> str:
    official = OFFICIAL[cell.preset]
    losses = [float(run["final_loss_sample_mean"]) for run in runs]
    up, down = (_mean(runs, f"payload_bytes_{way}_per_client_round") for way in ("up", "down"))
    return (
        f"| {cell.preset} | {cell.family} | {runs[0]['initial_loss_sample_mean']:.3f} "
        f"| {_spread(losses)} ({', '.join(f'{loss:.3f}' for loss in losses)}) | {_spread(official.losses)} "
        f"| {_mean(runs, 'seconds'):.0f} | {official.seconds:.0f} | {up:,.0f}, {down:,.0f} |"
    )


def _mean(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.mean(float(run[key]) for run in runs)


def _spread(losses: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{deviation}"


if __name__ == "__main__":
    main()
