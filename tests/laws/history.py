"""Runs of one setting changed, for the law that what ran before changes nothing: the table, a run, and runs in fresh processes.

    python -m tests.laws.history FOLDER < runs.json > outcomes.json

makes each run in a process of its own, forked from one that has imported everything and has run nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers.models.llama.modeling_llama
from flwr.app import Context, Message

import client.app
import server.app
from client.identity import Identity, Introduction
from client.keeper import Keeper
from fedtune import ledger_file
from fedtune.config import RunConfig
from fedtune.directions import Pool
from fedtune.run_folder import RunFolder
from fedtune.selftest import self_test
from simulations.engines.local_grid import LocalGrid

IMPORTED = (accelerate, peft, transformers.models.llama.modeling_llama)  # once, and not by every child

Settings = dict[str, Any]
Outcome = list[list[Any]]
"""Of each round: digest, held-out loss, training loss, generated texts, accuracy."""

# What is changed: a setting, what both runs have besides, and its other value. {NAME} is a path below the folder.
FERRET: Settings = {"algorithm": "ferret", "K": 40, "lr": 1e-2}
LORA: Settings = {"algorithm": "lora", "lr": 1e-1, "lora_rank": 2, "K": 1024}
TABLE: dict[str, tuple[Settings, Any]] = {
    "algorithm": ({}, "ferret"),
    "seed": ({}, 5),
    "rounds": ({}, 2),
    "clients": ({}, 4),
    "client_fraction": ({"clients_per_round": 0}, 0.7),
    "clients_per_round": ({}, 3),
    "local_steps": ({}, 3),
    "batch_size": ({}, 2),
    "lr": ({}, 2e-3),
    "sampling": ({"partition": "quantity", "clients_per_round": 1, "rounds": 3}, "examples"),
    "weighting": ({"partition": "quantity"}, "equal"),
    "K": ({}, 32),
    "eps": ({}, 1e-2),
    "directions_per_step": ({}, 2),
    "server_lr": (FERRET, 0.5),
    "anneal": ({**FERRET, "rounds": 2}, "cosine"),
    "momentum": ({**FERRET, "rounds": 2}, 0.5),
    "optimizer": (FERRET, "adamw"),
    "local_momentum": ({**FERRET, "optimizer": "momentum"}, 0.5),
    "accumulate": (FERRET, 2),
    "clip_norm": (FERRET, 0.1),
    "pool_size": (FERRET, 8),
    "blocks": (FERRET, "tensor"),
    "allocation": (FERRET, "uniform"),
    "reconstruction": (FERRET, "shrunken"),
    "coordinates": (FERRET, "shared"),
    "lora_rank": (LORA, 3),
    "lora_alpha": (LORA, 4.0),
    "lora_targets": (LORA, "q_proj"),
    "only_client": ({"algorithm": "local", "lr": 1e-2, "K": 1024}, "2"),
    "family": ({}, "lowrank"),
    "rank": ({"family": "lowrank"}, 2),
    "pool_every": ({"rounds": 2}, 1),
    "coefficient_bits": ({}, 3),
    "scalar_bits": ({}, 8),
    "model": ({}, "{other}"),
    "revision": ({}, "main"),
    "trust_remote_code": ({}, True),
    "dtype": ({}, "bfloat16"),
    "update_rounding": ({"dtype": "bfloat16"}, "stochastic"),
    "device": ({}, "auto"),
    "device_map": ({"device": "auto"}, "auto"),
    "offload": ({}, True),
    "threads": ({}, 2),
    "data": ({}, "{other.jsonl}"),
    "instruction_column": ({}, "category"),
    "input_column": ({}, "category"),
    "output_column": ({}, "category"),
    "category_column": ({"partition": "dirichlet"}, "parity"),
    "template": ({"max_length": 256}, "fedkseed"),
    "max_length": ({}, 36),
    "partition": ({}, "quantity"),
    "dirichlet_alpha": ({"partition": "quantity"}, 5.0),
    "min_samples": ({"partition": "quantity"}, 10),
    "holdout": ({}, 0.4),
    "holdout_category": ({}, "shapes"),
    "holdout_file": ({}, "{other.jsonl}"),
    "eval_every": ({"rounds": 3}, 2),
    "eval_samples": ({}, 3),
    "eval_batch_size": ({}, 1),
    "generate_samples": ({}, 1),
    "choices": ({}, "|".join(f"{kind} {number}" for kind in ("col", "num", "sha", "siz") for number in range(13))),
    "max_new_tokens": ({"generate_samples": 1}, 2),
    "out": ({}, "{elsewhere}"),
    "resume": ({}, "{finished}"),
    "over_selection": ({}, 0.5),
    "min_replies": ({}, 2),
    "short_round": ({}, "repeat"),
    "round_timeout": ({}, 60.0),
    "wait_timeout": ({}, 60.0),
    "min_clients": ({}, 1),
    "grace": ({}, 0.0),
    "max_examples": ({}, 5_000),
    "keep_updates": ({}, False),
}
SMALL: Settings = {
    "model": "{tiny}", "data": "{rows.jsonl}", "device": "cpu", "threads": 1, "clients": 3, "clients_per_round": 2, "rounds": 1,
    "local_steps": 2, "K": 16, "lr": 1e-3, "max_length": 64, "template": "plain", "min_samples": 2, "holdout": 0.2,
    "eval_samples": 4, "max_new_tokens": 4,
}  # fmt: skip


def pair(key: str) -> tuple[Settings, Settings]:
    """(settings as usual, the same with another value of `key`)."""
    common, value = TABLE[key]
    return {**SMALL, **common}, {**SMALL, **common, key: value}


def placed(settings: Settings, folder: Path) -> RunConfig:
    """The config with its paths below `folder`, and a run folder of its own unless the settings name one."""
    named = {
        key: str(folder / value[1:-1]) if isinstance(value, str) and value.startswith("{") else value
        for key, value in settings.items()
    }
    number = len(list((folder / "runs").iterdir()))
    named["out"] = f"{named['out']}{number}" if "out" in named else str(folder / "runs" / str(number))
    return RunConfig.from_mapping(named)


def outcome(config: RunConfig, folder: Path, keeper: Keeper | None = None) -> Outcome:
    """Run `config`, whose client 0 has a file of its own; with `keeper` it does the clients' work."""
    own = {} if config.algorithm == "local" else {0: {"data": str(folder / "own.jsonl")}}
    handler = client.app.app
    if keeper is not None:
        handler = _through(keeper)
    grid = LocalGrid(handler, config.clients, config.as_mapping(), seed=config.seed, node_configs=own)
    server.app.app(grid, grid.server_context())
    run = RunFolder.open(config.resume or config.out)
    rows = run.read_metrics()
    texts = [run.path / f"generated_round_{number}.json" for number in range(len(rows))]
    said = [json.loads(path.read_text(encoding="utf-8"))["texts"] if path.exists() else [] for path in texts]
    return [
        [row["digest"], row.get("eval_loss"), row.get("train_loss"), text, row.get("accuracy")]
        for row, text in zip(rows, said, strict=True)
    ]


def fresh(runs: Sequence[Settings], folder: Path) -> list[Outcome]:
    """The outcome of each run in a process that has run nothing before."""
    return [_forked(lambda settings=settings: outcome(placed(settings, folder), folder)) for settings in runs]


def _forked(work: Callable[[], Outcome]) -> Outcome:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # torch's pool of threads has to be made anew after a fork. Its first user does that, and two at once break it, as
        # when weights are loaded by several threads.
        torch.set_num_threads(1)
        try:
            found = work()
        except BaseException as error:
            found = [[f"{type(error).__name__}: {error}", None, None, [], None]]
        with os.fdopen(writing, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    found: Outcome = json.loads(said)
    return found


class _Kept:
    """The clients' side of one run, over a keeper that outlives it."""

    def __init__(self, keeper: Keeper, config: RunConfig) -> None:
        self._keeper, self._config = keeper, config

    def introduce(self, identity: Identity) -> Introduction:
        return self._keeper.introduce(self._config, identity)

    def train(self, identity: Identity, message: bytes, held: Sequence[bytes], seconds: float) -> tuple[bytes, list[bytes]]:
        return self._keeper.train(self._config, "1", identity, message, held, time.monotonic() + seconds)


def _through(keeper: Keeper) -> Callable[[Message, Context], Message]:
    """The ClientApp, with `keeper` as the worker of the node."""

    def handler(message: Message, context: Context) -> Message:
        before = client.app.trainer
        client.app.trainer = lambda message, context: _Kept(
            keeper, client.app.settings_of(context.run_config, context.node_config)
        )
        try:
            return client.app.app(message, context)
        finally:
            client.app.trainer = before

    return handler


def main() -> None:
    """Runs from stdin, outcomes to stdout."""
    torch.set_num_threads(1)
    os.fsync = lambda *_: None  # as in tests/conftest.py
    ledger_file.FLUSHED = "PRAGMA synchronous = OFF"
    importlib.metadata.version = cache(importlib.metadata.version)
    for family in ("hadamard", "lowrank", "axes"):
        self_test(Pool(family, 1, 16))  # kernels are compiled or read, once
    with suppress(ImportError, AttributeError):  # a version of transformers without it
        import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")  # 946 patterns, once
    runs: Sequence[Mapping[str, Any]] = json.load(sys.stdin)
    print(json.dumps(fresh([dict(settings) for settings in runs], Path(sys.argv[1]))), flush=True)
    os._exit(0)  # the end of a process that was forked waits for threads that the children had


if __name__ == "__main__":
    main()
