"""A run that plays back events instead of training, and what a command printed."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fedtune import progress
from fedtune.config import RunConfig
from fedtune.progress import (
    ClientFinished,
    ClientStep,
    EvaluationStep,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    emit,
)
from fedtune.run_folder import RunFolder

PARAMETERS = 1_000_000


@dataclass
class Outcome:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


def play(config: RunConfig, rounds: int | None = None) -> dict[str, object]:
    """The events of a run of `config`, its run folder and its summary, with made-up losses."""
    folder = RunFolder.create(config.out, config.as_mapping(), config)
    clients = tuple(str(number) for number in range(config.asked_per_round))
    who = (config.algorithm, config.rounds, config.clients, len(clients), config.local_steps)
    emit(RunStarted(*who, PARAMETERS, PARAMETERS, config.out))
    emit(EvaluationStep("loss", 1, 2))
    emit(RoundFinished(0, metrics(0, ())))
    for number in range(1, (config.rounds if rounds is None else rounds) + 1):
        emit(RoundStarted(number, clients))
        for client in clients:
            for step in range(config.local_steps):
                progress.check_stop()
                emit(ClientStep(client, step + 1, config.local_steps, 2.0))
            emit(ClientFinished(number, client, ""))
        row = metrics(number, clients)
        folder.append_metrics(row)
        emit(RoundFinished(number, row))
    summary = summarise(config)
    folder.write_json("summary.json", summary)
    emit(RunFinished(summary))
    return folder.summary()


def metrics(number: int, clients: tuple[str, ...], refused: dict[str, str] | None = None) -> dict[str, object]:
    """A row of metrics.jsonl."""
    return {
        "round": number,
        "clients": list(clients),
        "refused": refused or {},
        "eval_loss": 3.0 - 0.25 * number,
        "rouge_l": None,
        "train_loss": None if number == 0 else 2.5,
        "bytes_up": 100 * len(clients),
        "bytes_down": 1000 * len(clients),
        "messages_up": len(clients),
        "messages_down": len(clients),
        "seconds": {"clients": 1.0, "evaluate": 0.5},
        "digest": "ab" * 16,
    }


def summarise(config: RunConfig) -> dict[str, object]:
    """A summary.json."""
    messages = config.rounds * config.asked_per_round
    return {
        "algorithm": config.algorithm,
        "parameters": PARAMETERS,
        "initial_loss": 3.0,
        "final_loss": 2.5,
        "initial_rouge_l": 0.1,
        "final_rouge_l": 0.4,
        "payload_bytes_up": 100 * messages,
        "payload_bytes_down": 1000 * messages,
        "payload_bytes_up_per_client_round": 100.0,
        "payload_bytes_down_per_client_round": 1000.0,
        "fedavg_bytes": 8 * PARAMETERS * messages,
        "updates_refused": 0,
        "seconds": 75.0,
        "digest": "ab" * 16,
        "out": config.out,
    }


def last_json(text: str) -> dict[str, object]:
    """The last line of `text` as JSON."""
    found = json.loads(text.rstrip("\n").split("\n")[-1])
    assert isinstance(found, dict)
    return found
