"""A run that comes to nothing says so: a first round that failed for every client alike, and a model that is still the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.torch import load_file, save_file

import client.app
from fedtune.config import RunConfig
from fedtune.control import said
from fedtune.errors import (
    DeadlineError,
    DivergedError,
    FedtuneError,
    MissingPackageError,
    ModelError,
    NonFiniteError,
    RunError,
    StaleReplicaError,
    UnchangedError,
)
from fedtune.ledger import Ledger
from fedtune.progress import Event, Note, listening
from fedtune.resident import release
from fedtune.run_folder import RunFolder
from fedtune.verify import verify
from server.outcome import failed_alike, unchanged
from server.strategy import Tally
from tests.laws.federation import config, run

Settings = Callable[..., RunConfig]
TOO_SMALL = 1e-45  # as lr: every coefficient is below the finest grid


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Settings:
    def build(name: str = "fedkseed", **changes: object) -> RunConfig:
        quick = {"eval_samples": 4, "eval_every": 0, **changes}
        return config(name, tiny_folder, instructions, tmp_path / str(quick.pop("out", "run")), **quick)

    return build


def failing(error: Callable[[str], FedtuneError], *rounds: str) -> Callable[[Message, Context], Message]:
    """A ClientApp that answers training messages of these rounds (none: all) with `error(client id)`."""

    def handler(message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train" or (rounds and message.metadata.group_id not in rounds):
            return client.app.app(message, context)
        problem = error(str(context.node_config["partition-id"]))
        record = ConfigRecord({"problem": type(problem).__name__, "text": str(problem)})
        return Message(RecordDict({"fedtune": record}), reply_to=message)

    return handler


# ---------------------------------------------------------------------------------------------------- failed alike


@pytest.mark.parametrize("short_round", ["skip", "repeat"])
def test_what_is_wrong_for_every_client_ends_the_run_at_once_and_a_resume_trains_all_rounds(
    settings: Settings, short_round: str
) -> None:
    asked = settings(rounds=2, short_round=short_round)
    reason = "client {} needs the package 'triton'"
    with pytest.raises(MissingPackageError, match=r"Nobody could serve the round: all 3 clients .* reason: client \d needs"):
        run(asked, handler=failing(lambda name: MissingPackageError(reason.format(name))))
    folder = RunFolder.open(asked.out)
    assert folder.read_json("error.json")["type"] == "MissingPackageError"
    assert len(folder.read_metrics()) == 1
    again = run(asked.replace(resume=asked.out))
    assert len(set(again.digests)) == 3
    with Ledger.open(folder.path) as ledger:
        assert [event.detail["round"] for event in ledger.events("attempt")] == [1]
        assert (ledger.round(1).attempt, verify(ledger).rounds) == (2, 2)


def test_a_crash_of_every_client_is_a_reason_too(settings: Settings) -> None:
    def handler(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            raise ZeroDivisionError("in the model's own code")
        return client.app.app(message, context)

    with pytest.raises(RunError, match=r"Nobody could serve the round.*ZeroDivisionError.*in the model's own code"):
        run(settings(rounds=1), handler=handler)


@pytest.mark.parametrize("kind", [DeadlineError, StaleReplicaError, NonFiniteError])
def test_what_passes_by_itself_or_depends_on_the_step_is_left_to_three_rounds(settings: Settings, kind: type) -> None:
    with pytest.raises(DivergedError, match="No client returned a usable update for 3 rounds"):
        run(settings(rounds=4), handler=failing(lambda _: kind("too late")))


def test_once_the_model_has_moved_a_bad_round_is_only_a_bad_round(settings: Settings) -> None:
    outcome = run(settings(rounds=3), handler=failing(lambda _: ModelError("no memory"), "2"))
    assert outcome.digests[2] == outcome.digests[1] != outcome.digests[3]
    assert (outcome.summary["rounds_used"], outcome.summary["updates_used"], outcome.summary["updates_refused"]) == (2, 6, 3)


def tally(*problems: tuple[str, FedtuneError | None]) -> Tally:
    """A round in which these clients were asked; None: no answer."""
    found = Tally(clients=[name for name, _ in problems])
    found.problems = {name: problem for name, problem in problems if problem}
    found.refused = {name: f"{type(problem).__name__}: {problem}" for name, problem in problems}
    return found


def broken(name: str, code: int) -> RunError:
    return RunError(f"the client failed ({name})", code=code)


def test_only_all_clients_with_one_reason_are_everybody() -> None:
    """The oracle: each line differs from the first in one thing."""
    same = [("1", ModelError("client 1 has 1 GPU")), ("12", ModelError("client 12 has 1 GPU"))]
    ended = failed_alike(tally(*same), 5)
    assert isinstance(ended, ModelError)
    assert str(ended).endswith("all 2 clients that were asked failed with the same reason: client 1 has 1 GPU")
    for others in (
        [same[0], ("12", ModelError("client 12 has 2 GPUs"))],
        [same[0], ("12", RunError("client 12 has 1 GPU"))],
        [same[0], ("12", None)],
        [same[0]],  # one of five: one client ends nobody's run
        [],
    ):
        assert failed_alike(tally(*others), 5) is None, others
    assert failed_alike(tally(same[0]), 1) is not None


@pytest.mark.parametrize(("code", "ends"), [(1, True), (2, True), (3, False), (4, False), (5, False), (7, True), (8, True)])
def test_of_flowers_errors_only_those_of_the_app_end_a_run(code: int, ends: bool) -> None:
    found = failed_alike(tally(("a", broken("a", code)), ("b", broken("b", code))), 2)
    assert (found is not None) == ends


# ---------------------------------------------------------------------------------------------------- still the base


def test_a_run_whose_updates_were_all_refused_fails_with_its_reasons_and_has_a_summary(settings: Settings) -> None:
    asked = settings(rounds=2)
    with pytest.raises(UnchangedError, match=r"After 2 rounds .* still the base model: no update was usable .*client \d: Dea"):
        run(asked, handler=failing(lambda _: DeadlineError("too late")))
    folder = RunFolder.open(asked.out)
    assert (folder.summary()["rounds_used"], folder.summary()["updates_used"]) == (0, 0)
    assert folder.read_json("error.json")["type"] == "UnchangedError"
    assert said(folder)["doing"] == "failed"


def test_updates_that_are_zero_have_not_moved_the_model(settings: Settings) -> None:
    asked = settings(rounds=1, lr=TOO_SMALL)
    with pytest.raises(UnchangedError, match="the 3 updates that were used are zero: give a larger lr or eps"):
        run(asked)
    assert RunFolder.open(asked.out).summary()["updates_used"] == 3


def test_a_model_that_moved_is_changed() -> None:
    rows = [{"digest": digest, "clients": ["a"], "refused": {}} for digest in ("0", "0", "1")]
    assert unchanged(rows) is None
    assert "After 1 round the" in str(unchanged(rows[:2]))


def test_a_resume_of_a_finished_run_says_that_nothing_is_run(settings: Settings) -> None:
    asked = settings(rounds=1)
    first = run(asked)
    heard: list[Event] = []
    with listening(heard.append):
        again = run(asked.replace(resume=asked.out))
    assert again.digests == first.digests
    notes = [event.text for event in heard if isinstance(event, Note)]
    assert any(note.startswith("All 1 rounds were done before") and "none is run" in note for note in notes)
    assert not any(note.startswith("Going on") for note in notes)


# ---------------------------------------------------------------------------------------------------- a base of no use


@pytest.fixture
def spoilt(tiny_folder: Path, tmp_path: Path) -> Callable[[str, float], Path]:
    """The tiny model with every element of one tensor replaced."""

    def build(name: str, value: float) -> Path:
        folder = tmp_path / "spoilt"
        folder.mkdir()
        for path in tiny_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        weights = load_file(folder / "model.safetensors")
        weights[name] = torch.full_like(weights[name], value)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        release()
        return folder

    return build


def test_nan_weights_are_refused_before_there_is_a_folder(settings: Settings, spoilt: Callable[[str, float], Path]) -> None:
    asked = settings().replace(model=str(spoilt("model.norm.weight", float("nan"))))
    with pytest.raises(ModelError, match=r"32 of 32 weights of 'model\.norm\.weight' are NaN or infinite"):
        run(asked)
    assert not Path(asked.out).exists()


def test_a_base_whose_loss_is_not_finite_ends_the_run_before_training(
    settings: Settings, spoilt: Callable[[str, float], Path]
) -> None:
    """60,000 is a float16, and 32 of it are not."""
    model = spoilt("model.layers.0.self_attn.q_proj.weight", 6e4)
    asked = settings("fedkseed-16").replace(model=str(model))
    for again in (asked, asked.replace(resume=asked.out)):
        with pytest.raises(ModelError, match=r"loss of the base model .* not finite, for 4 of 4 .* set dtype = float32"):
            run(again)
    folder = RunFolder.open(asked.out)
    assert json.loads((folder.path / "error.json").read_text())["type"] == "ModelError"
    assert folder.read_metrics() == []
