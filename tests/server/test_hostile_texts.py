"""A run among hostile clients and data: no file of its folder and no log line has a character that acts, or a forged line."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.app
import server.app
from fedtune.errors import RunError
from fedtune.progress import ClientFinished, Note, RoundFinished, emit
from fedtune.run_folder import RunFolder
from server.log import LOG, logging_to
from server.rounds import Run
from simulations.engines.local_grid import LocalGrid
from tests.foreign_texts import ACTING, acting
from tests.laws.federation import config

HOSTILE = f"{ACTING} hf_abcdefghijklmnopqrstuv " + "-eyJ" * 200_000


def hostile(message: Message, context: Context) -> Message:
    """Two clients of four answer with texts, one as a problem and one as a crash."""
    if message.metadata.message_type != "train":
        return client.app.app(message, context)
    if context.node_config["partition-id"] == 0:
        raise ValueError(HOSTILE)
    if context.node_config["partition-id"] == 1:
        record = ConfigRecord({"problem": "DataError", "text": HOSTILE})
        return Message(RecordDict({"fedtune": record}), reply_to=message)
    return client.app.app(message, context)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A data file whose categories and texts act; a half character too."""
    path = tmp_path / "rows.jsonl"
    made = [
        {"instruction": f"{ACTING} {row}", "output": f"{ACTING}\n{row}", "category": f"{ACTING[:9]}\ud83d{row % 4}"}
        for row in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def texts(path: Path) -> Iterator[str]:
    """The text in a file: all of it, or the cells of a ledger."""
    if path.suffix == ".sqlite":
        with sqlite3.connect(path) as ledger:
            for (table,) in ledger.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
                for row in ledger.execute(f"SELECT * FROM {table}"):
                    yield from (cell for cell in row if isinstance(cell, str))
        ledger.close()
    elif path.suffix in (".json", ".jsonl"):
        yield path.read_text(encoding="utf-8")


def test_files_and_log_of_a_hostile_run_are_harmless(
    tiny_folder: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(
        "fedkseed", tiny_folder, rows, tmp_path / "run", rounds=2, clients_per_round=4, max_length=400, partition="dirichlet",
        holdout=0.1, eval_samples=4, generate_samples=2, max_new_tokens=8,
    )  # fmt: skip
    grid = LocalGrid(hostile, settings.clients, settings.as_mapping(), seed=0)
    with caplog.at_level(logging.INFO, logger="flwr"):
        logging.getLogger("flwr").propagate = True
        server.app.app(grid, grid.server_context())
    folder = RunFolder.open(settings.out)
    assert set(folder.read_metrics()[1]["refused"]) == {"0", "1"}
    checked = {path.name for path in folder.path.iterdir() if list(texts(path))}
    assert {"ledger.sqlite", "partition.json", "metrics.jsonl", "log.jsonl", "status.json", "config.json"} <= checked
    assert "generated_round_0.json" in checked
    for path in folder.path.iterdir():
        for text in texts(path):
            assert not list(acting(text)), path.name
            assert "hf_abc" not in text
        assert path.stat().st_size < 100_000, path.name
    lines = [record.getMessage() for record in caplog.records if record.name == "flwr"]
    assert len([line for line in lines if line.startswith("warning: round")]) == 4
    assert not [line for line in lines if list(acting(line, "")) or len(line) > 5000]


def test_what_ends_a_run_is_told_in_one_line(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    settings = config("fedkseed", tiny_folder, instructions, tmp_path / "run", rounds=1)

    def refuse(message: Message, context: Context) -> Message:
        record = ConfigRecord({"problem": "DataError", "text": HOSTILE})
        return Message(RecordDict({"fedtune": record}), reply_to=message)

    grid = LocalGrid(refuse, settings.clients, settings.as_mapping(), seed=0)
    with pytest.raises(Exception, match="PWNED") as ended:
        server.app.app(grid, grid.server_context())
    assert not list(acting(str(ended.value), ""))
    for path in (tmp_path / "run").iterdir():
        for text in texts(path):
            assert not list(acting(text)), path.name


def test_the_log_of_a_run_takes_any_text(tmp_path: Path) -> None:
    def run() -> None:
        with logging_to(tmp_path):
            emit(Note(HOSTILE))
            emit(ClientFinished(1, HOSTILE, HOSTILE))
            emit(RoundFinished(1, {ACTING: [ACTING, tmp_path, 1.5]}))
            raise ValueError(HOSTILE)

    with pytest.raises(ValueError, match="PWNED"):
        run()
    lines = (tmp_path / LOG).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["Note", "ClientFinished", "RoundFinished", "ValueError"]
    assert not [line for line in lines if list(acting(line, ""))]
    assert not any(list(acting(json.loads(line).get("text", ""))) for line in lines)


def test_the_error_of_a_run_is_one_harmless_line(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Run) -> None:
        raise RunError(HOSTILE)

    monkeypatch.setattr(Run, "execute", fail)
    settings = config("fedkseed", tiny_folder, instructions, tmp_path / "run", rounds=1)
    grid = LocalGrid(client.app.app, settings.clients, settings.as_mapping(), seed=0)
    with pytest.raises(RunError):
        server.app.app(grid, grid.server_context())
    folder = RunFolder.open(settings.out)
    for name, key in (("error.json", "message"), ("status.json", "error")):
        said = folder.read_json(name)[key]
        assert "PWNED" in said
        assert not list(acting(said, ""))
        assert len(said) < 5000
