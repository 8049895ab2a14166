"""A run that diverges says so once: on the screen's events, in log.jsonl, in `fedtune status` and in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.cli.operate import _lines, _status
from fedtune.config import RunConfig
from fedtune.control import Command, Order, send
from fedtune.progress import Event, Note, RoundFinished, listening
from fedtune.report.page import page
from fedtune.report.run import read_run
from fedtune.run_folder import RunFolder
from tests.laws.federation import config, run

Settings = Callable[..., RunConfig]


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Settings:
    def build(**changes: object) -> RunConfig:
        quick = {"eval_samples": 4, "local_steps": 2, "rounds": 3, "lr": 2.0, **changes}
        return config("fedavg", tiny_folder, instructions, tmp_path / "run", **quick)

    return build


def warnings(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note) and "diverges" in event.text]


def test_it_is_said_once_and_everywhere(settings: Settings) -> None:
    asked, heard = settings(), list[Event]()
    with listening(heard.append):
        run(asked)
    (text,) = warnings(heard)
    folder = RunFolder.open(asked.out)
    losses = [row["eval_loss"] for row in folder.read_metrics()]
    first = next(number for number, loss in enumerate(losses) if loss > 2 * losses[0])
    assert losses[-1] > 2 * losses[0]
    assert text.startswith(f"The held-out loss after round {first} is ")
    logged = [json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines()]
    (line,) = [line for line in logged if "diverges" in str(line)]
    assert line["level"] == "warning"
    assert _status(folder)["warning"] == text
    assert ("warning", text) in _lines(_status(folder))
    assert "the run diverges" in page([read_run(folder.path)])


def test_a_resume_does_not_say_it_again(settings: Settings) -> None:
    asked, heard = settings(), list[Event]()
    run(asked)
    with listening(heard.append):
        run(asked.replace(resume=asked.out, rounds=4))
    assert not warnings(heard)


def test_a_training_loss_and_a_later_evaluation_are_one_warning(settings: Settings) -> None:
    """Nothing is evaluated until the run is told to: the training loss shows it first, the evaluation says nothing more."""
    asked, heard = settings(eval_every=0), list[Event]()

    def evaluate(event: Event) -> None:
        heard.append(event)
        if isinstance(event, RoundFinished) and event.round == 2:
            send(RunFolder.open(asked.out), Order(Command.EVALUATE))

    with listening(evaluate):
        run(asked)
    (text,) = warnings(heard)
    assert text.startswith("The training loss after round 2 is ")


def test_a_run_that_learns_says_nothing(settings: Settings) -> None:
    asked, heard = settings(lr=1e-2), list[Event]()
    with listening(heard.append):
        run(asked)
    assert not warnings(heard)
    assert _status(RunFolder.open(asked.out))["warning"] == ""
