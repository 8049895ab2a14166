"""What a message costs beyond its computation when the node has a worker: `python -m benchmarks.worker_case`.

A random Llama of about 200 M parameters in a temporary folder, and one process for every message, as a SuperNode starts
them. The first message starts the worker and loads the model, the others find it. Seconds on the clock and of CPU; Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models import QUICK, Client, Size, sample, save_random
from client.address import Address
from client.connection import greet, stop
from fedtune import wire
from fedtune.config import RunConfig
from fedtune.wire import Instruction

ROOT = Path(__file__).parents[1]
WORKER = Size(1024, 15, 64)  # 206 M parameters
ROWS = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker_case", description=__doc__)
    parser.add_argument("--messages", type=int, default=4, help="messages after the first")
    parser.add_argument("--steps", type=int, default=1, help="local steps of a message")
    parser.add_argument("--device", default="cpu", help="as the setting")
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, not how fast")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fw-", dir="/tmp") as name:  # short: a socket lies in it
        folder = Path(name)
        size = QUICK if asked.quick else WORKER
        parameters = save_random(size, folder / "model")
        config = prepare(folder, size, asked.steps, asked.device)
        os.environ["FEDTUNE_WORKERS"] = str(folder / "workers")
        load = f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
        print(f"{parameters / 1e6:.1f} M float32 parameters, {asked.steps} local steps, {asked.device}, {load}\n")
        print(
            "| message | process | imports done | work in the worker | beyond the work | CPU of the process | reply | loads |"
        )
        print("|---|---|---|---|---|---|---|---|")
        try:
            for number in range(1, asked.messages + 2):
                print(row(number, folder, config), flush=True)
        finally:
            stop(Address.own(config.device), 60.0)


def prepare(folder: Path, size: Size, steps: int, device: str) -> RunConfig:
    """Write the client's rows, the run's settings and the instruction of its first round."""
    rows = [{"instruction": f"Say {n}.", "output": "one two three four five " * 8, "category": "a"} for n in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(
        model=str(folder / "model"), data=str(folder / "rows.jsonl"), max_length=size.tokens, local_steps=steps, device=device,
        clients=1, lr=1e-7,
    )  # fmt: skip
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "instruction.bin").write_bytes(instruction(config, size))
    return config


def instruction(config: RunConfig, size: Size) -> bytes:
    """The encoded instruction for a state that is not the base, so that the model must be rebuilt."""
    client = Client(config, (sample(size.tokens),))
    coefficients = client.coefficients()
    replica = client.resident.replica
    digest = coefficients.digest(replica.fingerprint)
    weights = client.draw_weights()
    written = Instruction(1, replica.fingerprint, client.layout.digest, digest, 0, coefficients.pools, weights)
    return wire.encode_instruction(written, config.coefficient_bits)


def row(number: int, folder: Path, config: RunConfig) -> str:
    """Send the message once more, and give a line of the table."""
    before = greet(Address.own(config.device))
    used, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker_client", str(folder)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    seconds = time.monotonic() - started
    after, now = greet(Address.own(config.device)), resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after is not None
    imported, _, length = done.stdout.split()
    work = after.work_seconds - (before.work_seconds if before else 0.0)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    figures = [f"{value:.2f} s" for value in (seconds, float(imported), work, seconds - work, cpu)]
    return "| " + " | ".join([str(number), *figures, f"{length} B", str(after.loads)]) + " |"


if __name__ == "__main__":
    main()
