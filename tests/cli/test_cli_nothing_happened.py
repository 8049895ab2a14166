"""Commands after which nothing is different say so, and their exit code tells: real runs of the tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from playback import Outcome, last_json
from safetensors.torch import load_file, save_file

from fedtune.cli import demo as demo_module
from fedtune.ledger import Ledger
from fedtune.resident import release
from fedtune.run_folder import RunFolder
from tests.experiments.tiny import preset

Fedtune = Callable[..., Outcome]
TOO_SMALL = 1e-45  # as lr: every coefficient is below the finest grid, so the model stays the base model
UNCHANGED = "the model is still the base model"


@pytest.fixture
def small(tiny_folder: Path, instructions: Path, tmp_path: Path) -> str:
    """A preset of one round whose updates move nothing."""
    return str(preset(tmp_path / "small.toml", tiny_folder, instructions, rounds=1, lr=TOO_SMALL, eval_samples=2))


@pytest.fixture(scope="module")
def unmoved(tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended where it began."""
    from fedtune.config import RunConfig
    from fedtune.errors import UnchangedError
    from simulations.engines.in_process import run_in_process

    place = tmp_path_factory.mktemp("unmoved")
    made = preset(place / "small.toml", tiny_folder, instructions, rounds=1, lr=TOO_SMALL, eval_samples=2)
    release()
    with pytest.raises(UnchangedError):
        run_in_process(RunConfig.load(made, {"out": str(place / "run")}))
    return place / "run"


def test_simulate_prints_the_summary_and_ends_with_what_happened(fedtune: Fedtune, small: str) -> None:
    outcome = fedtune("simulate", small, "--out", "a", "--json", "--quiet")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith(f"Error: After 1 round {UNCHANGED}: the 2 updates that were used are zero")
    assert (last_json(outcome.out)["rounds_used"], last_json(outcome.out)["updates_used"]) == (1, 2)
    assert fedtune("simulate", "--resume", "a", "--quiet").code == 1
    longer = fedtune("simulate", "--resume", "a", "--set", "rounds=2")
    assert (longer.code, "updates used, refused" in longer.out) == (1, True)
    assert "After 2 rounds" in longer.err.splitlines()[-1]


def test_export_refuses_the_base_model_unless_it_is_asked_for(fedtune: Fedtune, unmoved: Path, tmp_path: Path) -> None:
    for form in ("hf", "delta"):
        outcome = fedtune("export", str(unmoved), "--format", form, "--out", f"{form}.safetensors")
        assert outcome.code == 1
        assert "is the base model: no update has moved it" in outcome.err
        assert not (tmp_path / f"{form}.safetensors").exists()
        asked = fedtune("export", str(unmoved), "--format", form, "--base", "--out", f"{form}.safetensors")
        assert asked.code == 0
        assert "the model after round 1, which is the base model: no update has moved it" in asked.out
    best = fedtune("export", str(unmoved), "--best", "--out", "best")
    assert (best.code, "no round has a lower held-out loss" in best.err) == (1, True)


def test_apply_says_that_a_delta_is_empty(fedtune: Fedtune, unmoved: Path, tiny_folder: Path) -> None:
    assert fedtune("export", str(unmoved), "--format", "delta", "--base", "--out", "d.safetensors").code == 0
    outcome = fedtune("apply", str(tiny_folder), "d.safetensors", "--out", "same")
    assert (outcome.code, "which is the base model: no update has moved it" in outcome.out) == (0, True)


def test_a_damaged_head_of_coefficients_is_no_reason_to_call_them_the_base(fedtune: Fedtune, unmoved: Path) -> None:
    shutil.copytree(unmoved, "damaged")
    Path("damaged/coefficients.bin").write_bytes(Path("damaged/coefficients.bin").read_bytes()[:50])
    assert "coefficients.bin' is damaged" in fedtune("export", "damaged", "--out", "x").err


def test_compare_and_sweep_count_such_runs_as_failed_also_when_they_find_them(fedtune: Fedtune, small: str) -> None:
    for time in ("first", "again"):
        compared = fedtune("compare", small, "--algorithms", "fedkseed", "--seeds", "1", "--out", "both", "--json")
        assert compared.code == 1, time
        assert f"1 of 1 runs failed (fedkseed, seed 0: After 1 round {UNCHANGED}" in compared.err
        assert "No run was finished: there is no table." in compared.err
        assert json.loads(compared.out) == []
        swept = fedtune("sweep", small, "--over", "eps=1e-3", "--rungs", "1", "--out", "swept", "--json")
        assert swept.code == 1, time
        assert "No combination has run all rounds" in swept.err
        assert UNCHANGED in json.loads(swept.out)[0]["stopped"]


def test_a_process_that_cannot_be_started_is_no_ctrl_c(fedtune: Fedtune, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork server was killed: multiprocessing says EOFError, of which click makes Ctrl-C."""
    asked: list[BaseProcess] = []

    def start(self: BaseProcess) -> None:
        asked.append(self)
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(BaseProcess, "start", start)
    outcome = fedtune("compare", small, "--algorithms", "fedkseed", "--seeds", "1", "--out", "both")
    assert (outcome.code, len(asked)) == (1, 1)
    assert "The process from which runs are started has ended" in outcome.err


def test_the_demo_fails_with_the_first_run_that_does(fedtune: Fedtune, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "PRESETS", (Path(small).name,))
    outcome = fedtune("demo", "--quiet", "--out", "both")
    assert (outcome.code, UNCHANGED in outcome.err) == (1, True)


def test_the_loss_of_a_model_that_has_none_fails_after_it_is_printed(
    fedtune: Fedtune, small: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "overflows"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    outcome = fedtune("loss", small, "--model", str(folder), "--json")
    assert outcome.code == 1
    assert last_json(outcome.out)["loss"] is None
    assert "is not finite, for 2 of 2 samples" in outcome.err
    plain = fedtune("loss", small, "--model", str(folder))
    assert (plain.code, "held-out loss     nan" in plain.out) == (1, True)


def test_the_last_client_is_not_dropped_and_a_second_time_is_said(fedtune: Fedtune, unmoved: Path) -> None:
    shutil.copytree(unmoved, "run")
    with Ledger.open(Path("run"), writing=True) as ledger:
        asked, last = ledger.round(1).clients
        ledger.commit_event("drop", {"client": asked})
    assert "was dropped before" in fedtune("drop", "run", asked).err
    with Ledger.open(Path("run"), writing=True) as ledger:
        for name in ("x", "y"):
            ledger.commit_event("drop", {"client": name})
    outcome = fedtune("drop", "run", last)
    assert (outcome.code, "is the last one" in outcome.err) == (1, True)
    assert not Path("run/control").exists()


def test_a_client_that_no_round_knows_is_dropped_with_a_doubt(fedtune: Fedtune, unmoved: Path) -> None:
    shutil.copytree(unmoved, "run")
    outcome = fedtune("drop", "run", "nobody")
    assert outcome.code == 0
    assert "No round has asked a client 'nobody' so far" in outcome.err


def test_a_report_of_a_run_without_a_round_says_that_there_is_none(fedtune: Fedtune, unmoved: Path) -> None:
    shutil.copytree(unmoved, "run")
    for name in ("metrics.jsonl", "summary.json", "error.json", "ledger.sqlite", "status.json"):
        (Path("run") / name).unlink()
    outcome = fedtune("report", "run")
    assert outcome.code == 0
    page = Path("run/report.html").read_text()
    assert "0 of 1 rounds" in page
    assert "never measured" in page
    assert RunFolder.open("run").read_metrics() == []
    assert json.loads(Path("run/config.json").read_text())["used"]["rounds"] == 1
