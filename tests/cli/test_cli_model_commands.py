"""`data show`, `estimate` and `export` on a tiny model and a real run of it."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from playback import Outcome, last_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune import estimate as estimate_module
from fedtune.algorithms import first_order
from fedtune.architecture import needs_of_architecture
from fedtune.cli.data import marked
from fedtune.config import RunConfig
from fedtune.estimate import estimate_run, share_of_new
from fedtune.evaluation import evaluate
from fedtune.export import load_tuned
from fedtune.layout import fingerprint
from fedtune.models import LanguageModel, load_model
from fedtune.resident import release
from fedtune.run_folder import BEST, RunFolder
from simulations.engines.in_process import run_in_process

METHODS = {
    "fedkseed": {"algorithm": "fedkseed", "K": 64, "lr": 1e-3, "local_steps": 5},
    "ferret": {"algorithm": "ferret", "K": 100, "lr": 1e-2, "local_steps": 3, "pool_every": 1},
}


def settings(folder: Path, data: Path, out: Path, method: str = "ferret", **changes: object) -> RunConfig:
    small = {
        "model": str(folder), "data": str(data), "out": str(out), "clients": 4, "clients_per_round": 2, "rounds": 2,
        "max_length": 64, "template": "plain", "min_samples": 2, "threads": 1, "device": "cpu", "holdout": 0.2,
    }  # fmt: skip
    return RunConfig.from_mapping({**small, **METHODS[method], **changes})


@pytest.fixture
def tiny_preset(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Path:
    config = settings(tiny_folder, instructions, tmp_path / "run")
    path = tmp_path / "tiny.toml"
    lines = [f"{key} = {_toml(value)}" for key, value in config.as_mapping().items()]
    path.write_text("\n".join(["# Tiny", *lines]))
    return path


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run folder of two Ferret rounds."""
    out = tmp_path_factory.mktemp("runs") / "run"
    release()
    run_in_process(settings(tiny_folder, instructions, out))
    release()
    return RunFolder.open(out)


# ---------------------------------------------------------------------------------------------------- data show


def test_data_show_marks_what_is_trained_on(fedtune: Callable[..., Outcome], tiny_preset: Path) -> None:
    outcome = fedtune("data", "show", "tiny.toml", "--client", "1", "--samples", "1", "--set", "partition=dirichlet")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"client 1, sample 1 \(row \d+\): \d+ of \d+ tokens are trained on", outcome.out)
    assert re.search(r"number \d+\.[^\[]*\[\[ ?(col|num|sha|siz) \d+</s>\]\]", outcome.out)
    assert re.search(r"(?m)^client +samples +colours +numbers +shapes +sizes", outcome.out)
    held = re.search(r"(?m)^held out +(\d+)", outcome.out)
    assert held is not None
    assert held[1] == "16"
    assert "80 rows, 64 for training, 16 held out" in outcome.out
    assert "dropped: none" in outcome.out


def test_data_show_needs_no_weights(
    fedtune: Callable[..., Outcome], tiny_preset: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "no_weights"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert fedtune("data", "show", "tiny.toml", "--set", f"model={folder}").code == 0


def test_data_show_refuses_a_client_that_is_not_there(fedtune: Callable[..., Outcome], tiny_preset: Path) -> None:
    outcome = fedtune("data", "show", "tiny.toml", "--client", "4")
    assert outcome.code == 2
    assert "--client 4: clients are numbered from 0 to 3" in outcome.err


def test_colour_replaces_the_brackets() -> None:
    pieces = [("ask ", False), ("answer", True)]
    assert marked(pieces, colour=False).plain == "ask [[answer]]"
    coloured = marked(pieces, colour=True)
    assert coloured.plain == "ask answer"
    assert [str(span.style) for span in coloured.spans] == ["dim", "bold green"]


# ---------------------------------------------------------------------------------------------------- estimate


@pytest.mark.parametrize("method", METHODS)
def test_estimated_bytes_are_those_of_the_run(method: str, tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, instructions, tmp_path / "run", method)
    found = estimate_run(config)
    summary = run_in_process(config)
    assert found.parameters == summary["parameters"]
    assert found.up == summary["payload_bytes_up_per_client_round"]
    assert found.fedavg == summary["fedavg_bytes"]
    rows = RunFolder.open(tmp_path / "run").read_metrics()
    most = max(row["bytes_down"] / row["messages_down"] for row in rows[1:])
    assert most <= found.down * 2  # a client that missed rounds gets more than one pool
    release()


def test_estimate_counts_evaluations_and_clients(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    def evaluations(rounds: int, every: int) -> int:
        return estimate_module._evaluations(RunConfig(rounds=rounds, eval_every=every))

    assert [evaluations(10, 1), evaluations(10, 3), evaluations(10, 5), evaluations(10, 0)] == [11, 5, 3, 2]
    found = estimate_run(settings(tiny_folder, instructions, tmp_path))
    assert found.client_rounds == 4
    assert found.seconds == pytest.approx(4 * (3 * found.step_seconds + found.client_seconds) + 3 * found.evaluation_seconds)


def test_memory_has_the_sizes_of_the_tensors(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_order, "GATHERED", 0)  # as with a large model
    memory = estimate_run(settings(tiny_folder, instructions, tmp_path)).memory
    lm = load_model(RunConfig(model=str(tiny_folder), device="cpu"))
    weights = sum(parameter.numel() for parameter in lm.model.parameters()) * 4
    largest = max(parameter.numel() for parameter in lm.model.parameters()) * 4
    assert (memory.weights, memory.gradients, memory.optimizer, memory.difference) == (weights, largest, 0, 2 * largest)
    assert memory.scratch == weights  # a model this small is perturbed as a whole
    assert memory.saved > memory.logits > 0
    assert memory.zeroth_order > 2 * weights
    assert memory.first_order == weights + largest + memory.saved + memory.logits


@pytest.mark.parametrize(
    ("changes", "few", "gradients", "states"),
    [
        ({"clip_norm": 1.0}, 0, 1, 0),
        ({"accumulate": 2, "optimizer": "momentum"}, 0, 1, 1),
        ({"optimizer": "adamw"}, 0, 0, 2),
        ({}, 1 << 20, 1, 0),
    ],
)
def test_memory_counts_what_a_first_order_step_keeps(
    tiny_folder: Path, changes: dict[str, object], few: int, gradients: int, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All gradients, or the largest one, unless they are few."""
    monkeypatch.setattr(first_order, "GATHERED", few)
    config = RunConfig.from_mapping({"model": str(tiny_folder), "algorithm": "ferret", **changes})
    memory = needs_of_architecture(config).memory
    assert (memory.gradients == memory.weights) == bool(gradients)
    assert memory.optimizer == states * memory.weights


def test_how_many_batches_are_the_first_of_their_length() -> None:
    """One of one length; of two lengths and two steps, two in half of the cases; in the end as many as there are lengths."""
    assert share_of_new(Counter({40: 7}), 5) == pytest.approx(1 / 5)
    assert share_of_new(Counter({40: 3, 50: 3}), 2) == pytest.approx(1.5 / 2)
    assert 10_000 * share_of_new(Counter(range(30, 60)), 10_000) == pytest.approx(30)


def test_estimate_on_the_screen_and_as_json(fedtune: Callable[..., Outcome], tiny_preset: Path) -> None:
    outcome = fedtune("estimate", "tiny.toml", "--json")
    numbers = last_json(outcome.out)
    assert outcome.out.count("\n") == 1
    assert numbers["client_rounds"] == 4
    text = fedtune("estimate", "tiny.toml", "--set", "algorithm=fedkseed", "--set", "family=rademacher").out
    for title in (
        "parameters",
        "memory, scratch",
        "memory, peak",
        "up, client and round",
        "FedAvg, the same rounds",
        "time, whole run",
    ):
        assert title in text
    assert not (tiny_preset.parent / "run").exists()


# ---------------------------------------------------------------------------------------------------- export


def test_an_exported_model_loads_and_has_the_loss_of_the_run(
    fedtune: Callable[..., Outcome], trained: RunFolder, tmp_path: Path
) -> None:
    outcome = fedtune("export", str(trained.path), "--out", "deep/tuned")
    assert (outcome.code, outcome.err) == (0, f"The base model is '{trained.config().model}', as the run folder says.\n")
    summary = trained.summary()
    assert "the model after round 2, " in outcome.out
    assert str(summary["digest"]) in outcome.out
    folder = tmp_path / "deep" / "tuned"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    lm = LanguageModel(model, AutoTokenizer.from_pretrained(folder), torch.device("cpu"), (), str(folder))
    heldout = _heldout(trained)
    assert evaluate(lm, heldout, 16).loss == pytest.approx(summary["final_loss"], abs=1e-6)
    tuned, round, digest = load_tuned(trained)
    assert fingerprint(tuned.model) == fingerprint(model)
    assert (round, digest.hex()) == (2, summary["digest"])
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["tuned"]
    assert model.config.use_cache is True


def _heldout(run: RunFolder):
    from fedtune.data.federated import load_federated

    config = run.config()
    return load_federated(config, load_model(config).tokenizer).heldout


def test_the_best_round_and_a_base_model_that_moved(
    fedtune: Callable[..., Outcome], trained: RunFolder, tiny_folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder, moved)
    outcome = fedtune("export", str(trained.path), "--best", "--model", str(moved), "--out", "best")
    assert outcome.code == 0
    assert f"after round {trained.summary()['best_round']}," in outcome.out
    assert load_tuned(trained, BEST)[1] == trained.summary()["best_round"]


def test_export_refuses(fedtune: Callable[..., Outcome], trained: RunFolder, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "'there' exists already" in fedtune("export", str(trained.path), "--out", "there").err
    assert "There is no run folder 'none'" in fedtune("export", "none", "--out", "x").err
    assert "'there' is not a run folder" in fedtune("export", "there", "--out", "x").err

    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained(other)
    outcome = fedtune("export", str(trained.path), "--model", str(other), "--out", "x")
    assert outcome.code == 1
    assert "is not the one that the run started from" in outcome.err

    damaged = tmp_path / "damaged"
    shutil.copytree(trained.path, damaged)
    (damaged / "coefficients.bin").write_bytes(b"FT")
    assert "coefficients.bin' is damaged" in fedtune("export", "damaged", "--out", "x").err
    (damaged / "coefficients.bin").unlink()
    assert "has no coefficients.bin" in fedtune("export", "damaged", "--out", "x").err
    (tmp_path / "file").write_text("")
    assert "could not be written" in fedtune("export", str(trained.path), "--out", "file/x").err
    assert not (tmp_path / "x").exists()


def test_estimate_counts_the_updates_that_stay_on_the_disk(fedtune: Callable[..., Outcome]) -> None:
    """A run of full weights keeps every update, or with keep_updates = false those of the round in hand."""
    fedavg = ["estimate", "papers/fedkseed_ni_3b", "--meta", "--set", "algorithm=fedavg", "--set", "K=1024", "--set", "lr=1e-3"]
    kept = last_json(fedtune(*fedavg, "--json").out)
    lean = last_json(fedtune(*fedavg, "--json", "--set", "keep_updates=false").out)
    assert kept["updates_on_disk"] == kept["client_rounds"] > lean["updates_on_disk"]
    assert kept["disk"] - lean["disk"] == kept["up"] * (kept["client_rounds"] - lean["updates_on_disk"])
    assert "keep_updates" in fedtune(*fedavg).out
