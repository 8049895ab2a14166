"""`fedtune simulate --resume`, `ledger show`, `ledger verify`, `status` and the commands to a run, on a real small run."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from playback import Outcome, last_json

from fedtune.cli.main import app
from fedtune.config import RunConfig
from fedtune.control import Command, Doing, said
from fedtune.ledger import Ledger
from fedtune.progress import Event, RoundFinished, listening
from fedtune.run_folder import RunFolder
from simulations.engines.flower_app import config_lines

Fedtune = Callable[..., Outcome]


@pytest.fixture
def preset(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Path:
    """A run of two rounds with the tiny model."""
    small = RunConfig(
        model=str(tiny_folder), data=str(instructions), clients=4, clients_per_round=2, rounds=2, local_steps=2, K=64,
        max_length=64, template="plain", min_samples=2, threads=1, device="cpu", holdout=0.2, eval_samples=4,
    )  # fmt: skip
    path = tmp_path / "small.toml"
    path.write_text("\n".join(config_lines(small)))
    return path


def test_resume_goes_on_with_the_settings_of_the_run(fedtune: Fedtune, preset: Path) -> None:
    first = last_json(fedtune("simulate", "small.toml", "--out", "run", "--quiet", "--json").out)
    outcome = fedtune("simulate", "--resume", "run", "--set", "rounds=3", "--set", "eval_samples=9", "--json")
    assert outcome.code == 0, outcome.err
    longer = last_json(outcome.out)
    assert longer["rounds"] == 3
    assert longer["initial_loss"] == first["initial_loss"]
    assert "eval_samples stays 4 as in the rounds before: 9 is not used." in outcome.err
    assert "rounds = 3 from here on; it was 2." in outcome.err
    assert f"Going on after round 2 of 3, digest {first['digest']}." in outcome.err
    whole = fedtune("simulate", "small.toml", "--set", "rounds=3", "--out", "whole", "-q", "--json")
    assert last_json(whole.out)["digest"] == longer["digest"]


def test_what_cannot_be_resumed_is_one_sentence(fedtune: Fedtune, preset: Path) -> None:
    assert fedtune("simulate", "small.toml", "--out", "run", "--quiet").code == 0
    for arguments, code, text in (
        (("--resume", "run", "--set", "lr=1"), 1, r"Error: The run in 'run' was made with lr = 1e-05 \(now 1\.0\)"),
        (("--resume", "run", "--out", "x"), 2, r"leave --out away"),
        (("--resume", "run", "small.toml"), 2, r"leave PRESET away"),
        (("--resume", "nothing"), 1, r"Error: There is no run folder 'nothing'"),
        ((), 2, r"Error: Missing argument PRESET\. Give a preset, or --resume RUN"),
    ):
        outcome = fedtune("simulate", *arguments)
        assert (outcome.code, outcome.err.count("\n")) == (code, 1), outcome.err
        assert re.search(text, outcome.err), outcome.err


def test_show_lists_rounds_and_verify_replays_them(fedtune: Fedtune, preset: Path) -> None:
    digest = str(last_json(fedtune("simulate", "small.toml", "--out", "run", "--quiet", "--json").out)["digest"])
    shown = fedtune("ledger", "show", "run")
    assert shown.code == 0
    assert re.search(rf"(?m)^ +2 +\d \d +\S+ +\S+ .* {digest[:8]} *$", shown.out)
    rows = [json.loads(line) for line in fedtune("ledger", "show", "run", "--json").out.splitlines()]
    assert [row["number"] for row in rows] == [0, 1, 2]
    assert rows[2]["state"] == digest
    assert rows[2]["eval_loss"] > 0
    verified = fedtune("ledger", "verify", "run")
    assert (verified.code, verified.err) == (0, "")
    assert "2 rounds, 4 updates that lead to the same digests" in verified.out
    assert digest in verified.out


def test_verify_says_the_first_bad_row_and_exits_with_1(fedtune: Fedtune, preset: Path) -> None:
    assert fedtune("simulate", "small.toml", "--out", "run", "--quiet").code == 0
    with sqlite3.connect("run/ledger.sqlite") as raw:
        raw.execute("UPDATE updates SET share = share / 2 WHERE round = 1")
    raw.close()
    outcome = fedtune("ledger", "verify", "run")
    assert (outcome.code, outcome.out) == (1, "")
    assert "is not as it was written, from round 1 on: its updates are not those that it was written with" in outcome.err


def test_status_works_while_the_run_runs_and_after_it(fedtune: Fedtune, preset: Path) -> None:
    during: list[Outcome] = []

    def ask(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.round == 1:
            during.extend([fedtune("evaluate", "run"), fedtune("status", "run", "--json")])

    with listening(ask):
        assert fedtune("simulate", "small.toml", "--out", "run", "--quiet", "--set", "eval_every=0").code == 0
    told, running = during
    assert told.out == "The run will evaluate between two rounds; `fedtune status run` shows it.\n"
    assert last_json(running.out)["doing"] == Doing.RUNNING
    assert (last_json(running.out)["round"], last_json(running.out)["waiting"]) == (1, 1)
    after = fedtune("status", "run")
    assert re.search(r"(?m)^run +finished$", after.out)
    assert re.search(r"(?m)^round +2 of 2 \(fedkseed\), digest [0-9a-f]{32}$", after.out)
    assert re.search(r"(?m)^commands +1 followed or refused, 0 waiting; the last: .*evaluate", after.out)
    assert RunFolder.open("run").read_metrics()[1]["eval_loss"] is not None


def test_commands_to_a_run_that_nobody_carries_on(fedtune: Fedtune, preset: Path) -> None:
    assert fedtune("simulate", "small.toml", "--out", "run", "--quiet").code == 0
    for command in ("pause", "unpause", "stop", "evaluate"):
        outcome = fedtune(command, "run")
        assert outcome.code == 1
        assert f"Nobody carries on the run in 'run', so there is nothing to {command}" in outcome.err
    assert fedtune("drop", "run", "1").code == 0
    resumed = fedtune("simulate", "--resume", "run", "--set", "rounds=4", "--quiet")
    assert resumed.code == 0, resumed.err
    with Ledger.open(Path("run")) as ledger:
        assert all("1" not in ledger.round(number).clients for number in (3, 4))
    assert re.search(r"(?m)^dropped +1$", fedtune("status", "run").out)
    assert said(RunFolder.open("run"))["doing"] == Doing.FINISHED


def test_every_command_of_the_control_file_has_one_on_the_command_line() -> None:
    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {"status", *(command.value for command in Command)} <= names
