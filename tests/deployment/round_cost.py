"""What a deployed round costs beyond its computation: `python tests/deployment/round_cost.py`.

A server, its proxy and nodes on this machine, over TLS, from the files of `fedtune deploy init`. A round's time is that between
two commits to the ledger, without evaluation; its computation is what the slowest of the nodes' workers logs for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from federations import TINY, answers
from loopback import Loopback, change, wait_until

from benchmarks.models import QUICK, save_random
from benchmarks.worker_case import WORKER
from fedtune.config import RunConfig, Scalar, read_setting
from fedtune.ledger import Ledger
from simulations.engines.flower_app import config_lines

DONE = re.compile(r"training of client .*: done in ([0-9.]+) s")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="local steps of a round")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="a random Llama of 206 M parameters instead of a tiny one")
    parser.add_argument("--model", default="", metavar="DIR", help="this model instead, such as SmolLM2-135M-Instruct")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as algorithm=fedavg")
    parser.add_argument("--flower", action="store_true", help="with Flower's own waits, to compare")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what was started is ended on the way out
    size, names = WORKER if asked.large else QUICK, [str(number) for number in range(asked.nodes)]
    folder = Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))  # short: sockets lie in it
    loopback = Loopback(folder / "d", names)
    try:
        model = Path(asked.model) if asked.model else folder / "model"
        parameters = 0 if asked.model else save_random(size, model)
        rows = [{"instruction": f"Say {n}.", "output": "one two three four five " * 8, "category": "a"} for n in range(20)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in names:
            change(loopback.node(name) / "node.env", MODEL=str(model), DATA=str(folder / "rows.jsonl"))
            if asked.flower:
                as_flower(loopback.node(name))
        loopback.start(loopback.server)
        assert wait_until(lambda: answers(loopback.place)), loopback.says(loopback.server)
        assert loopback.call("register.sh").returncode == 0
        for name in names:
            loopback.start(loopback.node(name))
        what = f"'{model}'" if asked.model else f"{parameters / 1e6:.1f} M parameters"
        print(f"{what}, {asked.nodes} nodes, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        own = dict(map(read_setting, asked.set))
        run(loopback, folder, model, {"rounds": asked.rounds, "local_steps": asked.steps, "max_length": size.tokens, **own})
        report(loopback, folder, names)
        print(f"\nload average {os.getloadavg()[0]:.1f}")
    finally:
        loopback.close()
        shutil.rmtree(folder)


def as_flower(node: Path) -> None:
    """Have the node's scripts start Flower's program, with Flower's settings."""
    for name, ours, theirs in (
        ("supernode.sh", "python3 -P -m client.supernode", "flower-supernode"),
        ("supernode.sh", "export FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "#"),
    ):
        path = node / name
        text = path.read_text()
        assert ours in text
        path.write_text(text.replace(ours, theirs))


def run(loopback: Loopback, folder: Path, model: Path, asked: Mapping[str, Scalar]) -> None:
    """A run on all nodes without evaluation."""
    nodes = len(list((loopback.folder / "nodes").iterdir()))
    rows = str(folder / "rows.jsonl")
    usual = {key: value for key, value in TINY.items() if key not in ("K", "eps")}  # which not every algorithm has
    settings = {
        **usual, "model": str(model), "data": rows, "holdout_file": rows, "holdout_category": "", "batch_size": 1, "lr": 1e-7,
        "clients": nodes, "clients_per_round": nodes, "eval_every": 0, "eval_samples": 1, "out": str(folder / "run"), **asked,
    }  # fmt: skip
    (folder / "preset.toml").write_text("\n".join(config_lines(RunConfig.from_mapping(settings))) + "\n")
    done = loopback.run(folder / "preset.toml")
    assert done.returncode == 0, done.stdout + done.stderr


def report(loopback: Loopback, folder: Path, names: list[str]) -> None:
    """One line a round."""
    with Ledger.open(folder / "run") as ledger:
        rounds = list(ledger.rounds())
    logs = [next((loopback.node(name) / "workers").glob("*.log")).read_text() for name in names]
    work = [max(map(float, seconds)) for seconds in zip(*(DONE.findall(log) for log in logs), strict=True)]
    print("\n| round | seconds | computation: slowest node | server | beyond it |\n|---|---|---|---|---|")
    for before, row, node in zip(rounds, rounds[1:], work, strict=False):
        whole, server = row.elapsed - before.elapsed, sum(row.seconds.values()) - row.seconds["clients"]
        print(f"| {row.number} | {whole:.2f} | {node:.2f} | {server:.2f} | {whole - node - server:.2f} |")


if __name__ == "__main__":
    main()
