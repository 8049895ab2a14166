"""What a round leaves on the server: memory of the process and bytes of the ledger, at K = 4096 with ten clients a round.

`python -m simulations.growth` runs 150 rounds of each method with clients that answer at once, and prints what the rounds
after the first third added, per round. Memory is what Python and numpy hold (tracemalloc), and the process as a whole (Linux).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import server.app
from fedtune.config import RunConfig, Scalar
from fedtune.ledger_file import LEDGER
from fedtune.progress import Event, RoundStarted, RunFinished, listening
from fedtune.resident import release, resident
from simulations.engines.local_grid import LocalGrid
from simulations.overhead import write_rows
from simulations.pretend import PretendClient

CLIENTS, ASKED, K = 20, 10, 4096
METHODS: dict[str, dict[str, Scalar]] = {
    "fedkseed, one pool": {"algorithm": "fedkseed", "local_steps": 200},
    "fedkseed-pro, a fresh pool a round": {"algorithm": "fedkseed-pro", "local_steps": 200, "pool_every": 1},
    "ferret, one pool": {"algorithm": "ferret"},
    "ferret, a fresh pool a round": {"algorithm": "ferret", "pool_every": 1},
    "ferret, 8 bits, one pool": {"algorithm": "ferret", "scalar_bits": 8},
    "ferret, 8 bits, a fresh pool a round": {"algorithm": "ferret", "scalar_bits": 8, "pool_every": 1},
    "ferret, 4 bits, one pool": {"algorithm": "ferret", "scalar_bits": 4},
    "ferret, 4 bits, a fresh pool a round": {"algorithm": "ferret", "scalar_bits": 4, "pool_every": 1},
}


@dataclass(frozen=True)
class Growth:
    """Bytes that a round adds."""

    held: float
    process: float
    ledger: float
    update: float


def measure(method: dict[str, Scalar], rounds: int, folder: Path) -> Growth:
    """Run `rounds` rounds of `method` in `folder`; the last two thirds count."""
    write_rows(folder / "rows.jsonl", 2 * CLIENTS)
    config = RunConfig.from_mapping(
        {
            "data": str(folder / "rows.jsonl"), "category_column": "", "clients": CLIENTS, "clients_per_round": ASKED,
            "rounds": rounds, "K": K, "min_samples": 1, "eval_every": 0, "eval_samples": 1, "device": "cpu", "threads": 1,
            "out": str(folder / "run"), **method,
        }
    )  # fmt: skip
    resident(config).load()
    grid = LocalGrid(PretendClient(config), CLIENTS, config.as_mapping(), seed=config.seed)
    marks: list[tuple[float, float, float]] = []

    def mark(event: Event) -> None:
        if isinstance(event, RoundStarted | RunFinished):
            marks.append((tracemalloc.get_traced_memory()[0], process_bytes(), ledger_bytes(folder / "run")))

    tracemalloc.start()
    try:
        with listening(mark):
            server.app.app(grid, grid.server_context())
    finally:
        tracemalloc.stop()
        release()
    held, process, ledger = (slope(mark[column] for mark in marks[rounds // 3 : rounds]) for column in range(3))
    return Growth(held, process, ledger, sum(_payloads(folder / "run")) / (rounds * ASKED))


def slope(values: Iterable[float]) -> float:
    """Of the line that fits `values` best."""
    found = np.array([*values])
    return float(np.polyfit(np.arange(len(found)), found, 1)[0])


def process_bytes() -> float:
    """Memory of this process (resident set, Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))


def ledger_bytes(run: Path) -> float:
    """The ledger and its log of writes, which is at most some megabytes and is reused."""
    return float(sum(path.stat().st_size for path in run.glob(f"{LEDGER}*")))


def _payloads(run: Path) -> list[int]:
    from fedtune.ledger import Ledger

    with Ledger.open(run) as ledger:
        return [row.total.payload_up for row in ledger.rounds()]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m simulations.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--only", default="", help="methods whose name has this in it")
    chosen = parser.parse_args()
    print(f"K = {K}, {ASKED} of {CLIENTS} clients a round, {chosen.rounds} rounds; kB that a round adds\n")
    print("| method | held by Python and numpy | process | ledger | an update |\n|---|---|---|---|---|")
    for name, method in METHODS.items():
        if chosen.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measure(method, chosen.rounds, Path(folder))
        figures = (found.held, found.process, found.ledger, found.update)
        print(f"| {name} | " + " | ".join(f"{value / 1000:.1f}" for value in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
