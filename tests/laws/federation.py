"""A whole tiny federation in this process, with hooks to misbehave: what the law tests run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.app
import server.app
from fedtune.config import RunConfig
from fedtune.progress import ClientFinished, Event, listening
from fedtune.run_folder import RunFolder
from simulations.engines.local_grid import Faults, LocalGrid

SETTINGS: dict[str, dict[str, object]] = {
    "fedkseed": {"algorithm": "fedkseed", "K": 64, "lr": 1e-3, "eps": 1e-3},
    "fedkseed-pro": {"algorithm": "fedkseed-pro", "K": 64, "lr": 1e-3, "eps": 1e-3},
    "fedkseed-fresh": {"algorithm": "fedkseed", "K": 64, "lr": 1e-3, "eps": 1e-3, "pool_every": 1},
    "fedkseed-two": {"algorithm": "fedkseed-pro", "K": 64, "lr": 1e-3, "eps": 1e-3, "directions_per_step": 2},
    "fedkseed-lowrank": {"algorithm": "fedkseed", "K": 64, "lr": 1e-3, "eps": 1e-3, "family": "lowrank", "rank": 2},
    "fedkseed-16": {
        "algorithm": "fedkseed", "K": 64, "lr": 1e-3, "eps": 1e-3, "dtype": "float16", "update_rounding": "master",
    },
    "ferret": {"algorithm": "ferret", "K": 200, "lr": 1e-2, "pool_every": 1},
    "ferret-16": {"algorithm": "ferret", "K": 200, "lr": 1e-2, "dtype": "float16", "update_rounding": "master"},
    "ferret-fixed": {"algorithm": "ferret", "K": 200, "lr": 1e-2, "momentum": 0.5, "reconstruction": "shrunken"},
    "fedkseed-short": {
        "algorithm": "fedkseed", "K": 64, "lr": 1e-3, "eps": 1e-3, "scalar_bits": 8, "coefficient_bits": 4,
    },
    "ferret-shared": {
        "algorithm": "ferret", "K": 200, "lr": 1e-2, "pool_every": 1, "coordinates": "shared", "scalar_bits": 4,
        "coefficient_bits": 4,
    },
    "ferret-official": {
        "algorithm": "ferret", "K": 16, "lr": 1e-2, "momentum": 0.5,
        "family": "torch-truncated", "allocation": "official", "reconstruction": "official",
    },
    "subspace": {"algorithm": "subspace", "K": 200},
    "subspace-16": {
        "algorithm": "subspace", "K": 200, "pool_every": 2, "dtype": "float16", "update_rounding": "stochastic",
        "optimizer": "adamw", "allocation": "norm",
    },
    "subspace-short": {
        "algorithm": "subspace", "K": 100, "family": "rademacher", "scalar_bits": 4, "coefficient_bits": 4, "optimizer": "sgd",
    },
    "fedavg": {"algorithm": "fedavg", "lr": 1e-2},
    "fedavg-16bit": {
        "algorithm": "fedavg", "lr": 1e-3, "optimizer": "adamw", "server_lr": 0.5, "coefficient_bits": 16, "scalar_bits": 16,
    },
    "fedzo": {"algorithm": "fedzo", "lr": 1e-3, "eps": 1e-3},
    "fedzo-lowrank": {"algorithm": "fedzo", "lr": 1e-3, "eps": 1e-3, "family": "lowrank", "rank": 2, "directions_per_step": 2},
    "decomfl": {"algorithm": "decomfl", "lr": 1e-3, "eps": 1e-3, "directions_per_step": 2},
    "lora": {"algorithm": "lora", "lr": 1e-1, "lora_rank": 2},
    "local": {"algorithm": "local", "lr": 1e-2, "only_client": "2"},
    "central": {"algorithm": "central", "lr": 1e-2},
}  # fmt: skip
ALGORITHMS = tuple(SETTINGS)


@dataclass
class Outcome:
    """What a run left behind."""

    folder: RunFolder
    summary: dict[str, object]
    digests: list[str]
    refused: dict[str, str] = field(default_factory=dict)


def config(name: str, model: Path, data: Path, out: Path, **changes: object) -> RunConfig:
    """A run of three rounds, three of four clients, four steps."""
    small = {
        "model": str(model), "data": str(data), "out": str(out), "clients": 4, "clients_per_round": 3, "rounds": 3,
        "local_steps": 4, "max_length": 64, "template": "plain", "min_samples": 2, "threads": 1, "holdout": 0.2, "seed": 11,
    }  # fmt: skip
    return RunConfig.from_mapping({**small, **SETTINGS[name], **changes})


def run(
    settings: RunConfig,
    faults: Faults | None = None,
    handler: Callable[[Message, Context], Message] = client.app.app,
) -> Outcome:
    """Run to the end on a LocalGrid."""
    refused: dict[str, str] = {}

    def listen(event: Event) -> None:
        if isinstance(event, ClientFinished) and event.problem:
            refused[f"{event.round}/{event.client}"] = event.problem

    grid = LocalGrid(handler, settings.clients, settings.as_mapping(), seed=settings.seed, faults=faults)
    with listening(listen):
        server.app.app(grid, grid.server_context())
    folder = RunFolder.open(settings.out)
    digests = [str(row["digest"]) for row in folder.read_metrics()]
    return Outcome(folder, folder.summary(), digests, refused)


def with_payload(reply: Message, payload: bytes | None) -> Message:
    """The reply with other bytes in it (None: without a payload)."""
    record = ConfigRecord({} if payload is None else {"payload": payload})
    changed = Message(RecordDict({"fedtune": record}), reply_to=reply)
    changed.metadata.__dict__.update(reply.metadata.__dict__)
    return changed


def payload_of(message: Message) -> bytes | None:
    """The payload of a training message or reply; None for anything else."""
    if message.has_error() or "fedtune" not in message.content.config_records:
        return None
    payload = message.content.config_records["fedtune"].get("payload")
    return payload if isinstance(payload, bytes) else None


def lying(change: Callable[[bytes], bytes]) -> tuple[Faults, Faults]:
    """(The client that is asked first in the run changes its updates, the same client is silent); use them in this order."""
    asked: list[int] = []

    def is_liar(message: Message) -> bool:
        asked.append(message.metadata.dst_node_id)
        return message.metadata.dst_node_id == asked[0]

    def tamper(message: Message, reply: Message) -> Message:
        payload = payload_of(reply)
        if payload is None or message.metadata.message_type != "train":
            return reply
        return with_payload(reply, change(payload)) if is_liar(message) else reply

    return Faults(tamper=tamper), Faults(drop=lambda message: message.metadata.message_type == "train" and is_liar(message))
