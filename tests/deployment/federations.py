"""A small federation on a loopback deployment: the same run as a simulation, with each client's files on its own node."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from loopback import Loopback, change

from fedtune.config import RunConfig
from fedtune.data.files import read_rows
from fedtune.deploy.check.network import Place, certificate_at, fleet
from fedtune.embedded import embedded_path
from simulations.engines.flower_app import config_lines
from simulations.engines.processes import living

NODES = ("0", "1")  # the ids of a simulation's clients, so that both draw the same batches
TINY = {
    "algorithm": "fedkseed", "rounds": 2, "local_steps": 4, "batch_size": 2, "K": 64, "lr": 4e-4, "eps": 1e-3,
    "model": "embedded", "data": "embedded", "template": "chat", "max_length": 64, "partition": "iid",
    "clients": 2, "clients_per_round": 2, "holdout_category": "unseen", "eval_samples": 20, "eval_batch_size": 20,
    "threads": 1, "device": "cpu",
}  # fmt: skip


@dataclass
class Federation:
    """A running deployment of two nodes that hold what the clients of `simulated` held."""

    loopback: Loopback
    simulated: dict[str, object]
    folder: Path

    def preset(self, name: str, **changes: object) -> Path:
        """A preset of the simulated run with changes; the run folder gets its name."""
        config = RunConfig.from_mapping({**TINY, **changes, "out": str(self.folder / name)})
        path = self.folder / f"{name}.toml"
        path.write_text("\n".join(config_lines(config)) + "\n")
        return path

    def rows(self, name: str) -> list[dict[str, object]]:
        """The rounds of a run that are finished."""
        path = self.folder / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def give_files(loopback: Loopback, folder: Path) -> None:
    """Give every node a copy of the model (in a folder with a space) and the rows of its client, in a file of its own."""
    rows = read_rows("embedded")
    shares = json.loads((folder / "simulated" / "partition.json").read_text())["clients"]
    for name, share in zip(NODES, shares, strict=True):
        model, data = folder / f"site {name}" / "model", folder / f"site {name}" / "rows.jsonl"
        shutil.copytree(embedded_path("model"), model)
        data.write_text("".join(json.dumps(rows[row]) + "\n" for row in share))
        change(loopback.node(name) / "node.env", MODEL=str(model), DATA=str(data))


def answers(place: Place) -> bool:
    """Whether a proxy with the right certificate and a SuperLink behind it are there."""
    shown = list(certificate_at(place))
    return all(finding.state == "ok" for finding in shown) and fleet(place).state == "ok"


def process_of(folder: Path, program: bytes) -> int:
    """The id of the one process that `folder` started with `program` in its command line."""
    found = [number for number in living(folder) if program in Path(f"/proc/{number}/cmdline").read_bytes()]
    assert len(found) == 1, found
    return found[0]
