"""Accuracy and categories of a whole run: in its rows, its summary and its ledger, and the same after every kind of resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from fedtune.cli.main import main
from fedtune.config import RunConfig
from fedtune.data.federated import load_federated
from fedtune.evaluation import evaluate_heldout
from fedtune.experiments.cells import as_toml
from fedtune.ledger import Ledger
from fedtune.models import load_model
from fedtune.progress import Event, Note, listening
from server import record
from tests.laws.federation import config, run

Settings = Callable[..., RunConfig]


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Settings:
    """Runs of two rounds with the answers of the file's first category."""
    answers = "|".join(f"col {number}" for number in range(13))

    def build(**changes: object) -> RunConfig:
        more = {"rounds": 2, "eval_samples": 12, "choices": answers, **changes}
        return config("fedkseed", tiny_folder, instructions, tmp_path / str(more.pop("out", "run")), **more)

    return build


def test_a_run_writes_down_what_was_measured(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    used = settings()
    seen: list[Event] = []
    with listening(seen.append):
        outcome = run(used)
    rows = outcome.folder.read_metrics()
    lm = load_model(used)
    data = load_federated(used, lm.tokenizer)
    assert data.questions.note in [event.text for event in seen if isinstance(event, Note)]
    expected = evaluate_heldout(lm, data, used.eval_batch_size)
    assert 0 < expected.questions < expected.samples
    assert (rows[0]["accuracy"], rows[0]["questions"]) == (pytest.approx(expected.accuracy), expected.questions)
    assert {name: scores["samples"] for name, scores in rows[0]["categories"].items()} == data.report.heldout
    for name, scores in expected.categories.items():
        assert rows[0]["categories"][name]["eval_loss"] == pytest.approx(scores.loss, abs=1e-6)
        assert (rows[0]["categories"][name]["accuracy"] is None) == (name != "colours")
    summary = outcome.folder.summary()
    assert (summary["initial_accuracy"], summary["final_accuracy"]) == (rows[0]["accuracy"], rows[-1]["accuracy"])
    assert summary["categories"]["sizes"] == {
        "samples": rows[0]["categories"]["sizes"]["samples"],
        "initial_loss": rows[0]["categories"]["sizes"]["eval_loss"],
        "initial_accuracy": None,
        "final_loss": rows[-1]["categories"]["sizes"]["eval_loss"],
        "final_accuracy": None,
    }
    for command in (["status", used.out, "--json"], ["ledger", "show", used.out, "--json"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert not ended.value.code
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert said.get("last_accuracy", said.get("accuracy")) == rows[-1]["accuracy"]


def test_fedtune_loss_measures_the_same(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used = settings()
    (tmp_path / "small.toml").write_text(as_toml(used), encoding="utf-8")
    lm = load_model(used)
    expected = evaluate_heldout(lm, load_federated(used, lm.tokenizer), used.eval_batch_size)
    said = []
    for more in (["--json"], []):
        with pytest.raises(SystemExit) as ended:
            main(["loss", str(tmp_path / "small.toml"), *more])
        assert not ended.value.code
        said.append(capsys.readouterr().out)
    found = json.loads(said[0])
    assert (found["accuracy"], found["questions"]) == (expected.accuracy, expected.questions)
    assert found["categories"] == {name: asdict(scores) for name, scores in expected.categories.items()}
    assert f"accuracy          {expected.accuracy:.4f}, of {expected.questions} questions" in said[1]
    assert f"  sizes           {expected.categories['sizes'].loss:.4f}, of " in said[1]


def test_a_resume_keeps_scores_and_answers_and_measures_what_is_missing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(settings(out="whole")).folder.read_metrics()
    part = settings()
    real = record.Record.evaluated

    def killed(self: record.Record, number: int, *measured: object) -> None:
        if number == 2:
            raise KeyboardInterrupt
        real(self, number, *measured)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(record.Record, "evaluated", killed)
        with pytest.raises(KeyboardInterrupt):
            run(part)
    (Path(part.out) / "metrics.jsonl").unlink()
    again = run(part.replace(resume=part.out, choices="num 0|num 7")).folder
    keys = ("round", "eval_loss", "accuracy", "questions", "categories", "digest")
    assert [{key: row[key] for key in keys} for row in again.read_metrics()] == [
        {key: row[key] for key in keys} for row in whole
    ]
    assert again.config().choices == part.choices


def test_a_run_without_questions_has_no_accuracy_and_old_ledgers_have_neither(settings: Settings) -> None:
    outcome = run(settings(choices="", rounds=1))
    row = outcome.folder.read_metrics()[-1]
    assert (row["accuracy"], row["questions"], outcome.summary["final_accuracy"]) == (None, 0, None)
    with Ledger.open(outcome.folder.path) as ledger:
        old = {key: value for key, value in next(iter(ledger.events("evaluation"))).detail.items() if key == "eval_loss"}
        found = record._row(ledger.round(0), old)
    assert (found["eval_loss"], found["accuracy"], found["questions"], found["categories"]) == (
        old["eval_loss"],
        None,
        None,
        None,
    )
