"""What the engine itself costs: a run of a thousand clients that answer at once, in CPU seconds per client message.

`python -m simulations.overhead` prints one line. The figure holds everything but the clients' work and the evaluations of
the base and the final model: instructions, protobuf bytes, checks, aggregation, ledger and files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import server.app
from fedtune.config import RunConfig
from fedtune.progress import Event, RoundStarted, RunFinished, listening
from fedtune.resident import resident
from simulations.engines.local_grid import LocalGrid
from simulations.pretend import PretendClient


@dataclass(frozen=True)
class Overhead:
    """Milliseconds of CPU and of wall time per client message, and CPU milliseconds of one introduction."""

    messages: int
    cpu_ms: float
    wall_ms: float
    introduction_cpu_ms: float


def write_rows(path: Path, count: int) -> None:
    """So many short instructions."""
    rows = "".join(json.dumps({"instruction": f"say {row}", "output": f"{row}"}) + "\n" for row in range(count))
    path.write_text(rows, encoding="utf-8")


def measure(clients: int, rounds: int, asked: int, folder: Path) -> Overhead:
    """Run it in `folder`."""
    write_rows(folder / "rows.jsonl", 2 * clients)
    config = RunConfig(
        data=str(folder / "rows.jsonl"), category_column="", clients=clients, clients_per_round=asked, rounds=rounds,
        local_steps=50, min_samples=1, eval_every=0, eval_samples=1, device="cpu", threads=1, out=str(folder / "run"),
    )  # fmt: skip
    resident(config).load()
    pretend = PretendClient(config)
    grid = LocalGrid(pretend, clients, config.as_mapping(), seed=config.seed)
    marks: list[tuple[float, float]] = []

    def mark(event: Event) -> None:
        if isinstance(event, RoundStarted | RunFinished):
            marks.append((time.process_time() - pretend.cpu_seconds, time.monotonic()))

    begun = time.process_time()
    with listening(mark):
        server.app.app(grid, grid.server_context())
    messages = rounds * asked
    cpu, wall = ((marks[-1][column] - marks[0][column]) * 1000 / messages for column in (0, 1))
    return Overhead(messages, cpu, wall, (marks[0][0] - begun) * 1000 / clients)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m simulations.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--asked", type=int, default=10, help="clients a round")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(chosen.clients, chosen.rounds, chosen.asked, Path(folder))
    print(
        f"{chosen.clients} clients, {chosen.rounds} rounds of {chosen.asked}: {found.cpu_ms:.2f} ms CPU "
        f"({found.wall_ms:.2f} ms wall) a client message, {found.introduction_cpu_ms:.2f} ms CPU an introduction"
    )


if __name__ == "__main__":
    main()
