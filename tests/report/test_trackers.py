"""Trackers: TensorBoard's own files read back; stand-ins for wandb and mlflow, which are told what the run says."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from run_lines import line

from fedtune.cli import main
from fedtune.config import RunConfig
from fedtune.errors import MissingPackageError
from fedtune.progress import Event, Note, RoundFinished, emit, heard, listening
from fedtune.report.trackers import Tracker, numbers, tracking
from simulations.engines.flower_app import config_lines


class Recorder:
    """Takes every call and writes it down."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Recorder:
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.from_mapping({"out": str(tmp_path / "first"), "rounds": 2})


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> Recorder:
    recorder, module = Recorder(), ModuleType(name)
    module.__getattr__ = recorder.__getattr__  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, name, module)
    return recorder


def play() -> None:
    emit(Note("nothing to log"))
    for number in range(3):
        emit(RoundFinished(number, line(number)))


def fail() -> None:
    play()
    raise RuntimeError("boom")


def test_what_is_logged_of_a_round() -> None:
    assert numbers(line(1, refused={"3": "late"}, seconds={"clients": 1.5, "odd": None, "evaluate": 0.5})) == {
        "loss/held_out": 1.0,
        "loss/train": 1.8,
        "quality/rouge_l": 0.1,
        "bytes/up": 2000.0,
        "bytes/down": 5000.0,
        "seconds/clients": 1.5,
        "seconds/evaluate": 0.5,
        "seconds/round": 2.0,
        "clients/refused": 1.0,
    }
    scores = {"eval_loss": 1.5, "accuracy": None}
    found = numbers({"accuracy": 0.75, "categories": {"a b": scores, "a/b": {**scores, "accuracy": 1}, "": scores, "odd": 3}})
    assert {key: value for key, value in found.items() if value > 0} == {
        "quality/accuracy": 0.75,
        "loss_of/a_b": 1.5,
        "loss_of/a_b.2": 1.5,
        "accuracy_of/a_b.2": 1.0,
        "loss_of/none": 1.5,
    }
    assert numbers({}) == {"bytes/up": 0.0, "bytes/down": 0.0, "seconds/round": 0.0, "clients/refused": 0.0}
    assert "loss/held_out" not in numbers({"eval_loss": float("nan")})


@pytest.mark.filterwarnings("default")
def test_tensorboard_reads_what_was_logged(config: RunConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking(Tracker.tensorboard, config):
        play()
    seen = EventAccumulator(str(Path(config.out) / "tensorboard"))
    seen.Reload()
    assert [(event.step, event.value) for event in seen.Scalars("loss/held_out")] == [
        (0, 2.0), (1, 1.0), (2, pytest.approx(2 / 3)),
    ]  # fmt: skip
    assert [event.step for event in seen.Scalars("loss/train")] == [1, 2]
    assert [event.value for event in seen.Scalars("bytes/so_far")] == [0.0, 7000.0, 14000.0]


def test_wandb_is_told(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = stand_in(monkeypatch, "wandb")
    with tracking(Tracker.wandb, config):
        play()
    assert wandb.named("init")[0][1]["name"] == "first"
    assert wandb.named("init")[0][1]["config"]["rounds"] == 2
    assert [kwargs["step"] for _, kwargs in wandb.named("log")] == [0, 1, 2]
    assert wandb.named("log")[1][0][0]["loss/held_out"] == 1.0
    assert wandb.named("finish") == [((), {"exit_code": 0})]


def test_mlflow_is_told_also_of_a_run_that_fails(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = stand_in(monkeypatch, "mlflow")
    with pytest.raises(RuntimeError, match="boom"), tracking(Tracker.mlflow, config):
        fail()
    assert [kwargs["step"] for _, kwargs in mlflow.named("log_metrics")] == [0, 1, 2]
    assert mlflow.named("end_run") == [((), {"status": "FAILED"})]
    assert not heard()


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError("no network")

    stand_in(monkeypatch, "wandb")
    monkeypatch.setattr(sys.modules["wandb"], "init", refuse, raising=False)
    notes: list[Event] = []
    with listening(notes.append), tracking(Tracker.wandb, config):
        play()
    texts = [event.text for event in notes if isinstance(event, Note) and event.warning]
    assert texts == ["wandb is no longer told about this run (OSError: no network); the run goes on."]


def test_nothing_is_begun_for_a_run_that_does_not_start(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = stand_in(monkeypatch, "wandb")
    with tracking(Tracker.wandb, config):
        pass
    assert wandb.calls == []


@pytest.mark.parametrize(
    ("tracker", "module", "install"),
    [
        (Tracker.tensorboard, "torch.utils.tensorboard", r"'tensorboard'.*pip install 'fedtune\[tensorboard\]'"),
        (Tracker.wandb, "wandb", r"'wandb'.*pip install 'wandb'"),
        (Tracker.mlflow, "mlflow", r"'mlflow'.*pip install 'mlflow'"),
    ],
)
def test_a_missing_package_is_named(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tracker: Tracker, module: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with warnings.catch_warnings(), pytest.raises(MissingPackageError, match=install), tracking(tracker, config):
        pytest.fail("nothing may start")


def test_simulate_tracks_a_real_run(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = stand_in(monkeypatch, "wandb")
    small = RunConfig.from_mapping({
        "model": str(tiny_folder), "data": str(instructions), "clients": 4, "clients_per_round": 2, "rounds": 1, "K": 64,
        "local_steps": 1, "max_length": 64, "template": "plain", "min_samples": 2, "threads": 1, "device": "cpu",
        "holdout": 0.2, "eval_samples": 4,
    })  # fmt: skip
    preset = tmp_path / "small.toml"
    preset.write_text("\n".join(config_lines(small)), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["simulate", str(preset), "--out", str(tmp_path / "run"), "--track", "wandb", "--quiet"])
    assert stop.value.code == 0
    assert [kwargs["step"] for _, kwargs in wandb.named("log")] == [0, 1]
    assert wandb.named("log")[1][0][0]["bytes/up"] > 0
