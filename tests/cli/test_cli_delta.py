"""`export --format delta`, `apply`, `delta show` and `ledger diff` on real runs of a tiny model."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from playback import Outcome, last_json
from transformers import AutoModelForCausalLM

from fedtune.apply import apply_delta
from fedtune.config import RunConfig
from fedtune.data.federated import load_federated
from fedtune.delta import Delta, encode
from fedtune.delta_reader import read
from fedtune.evaluation import evaluate
from fedtune.export import delta_of_run, load_tuned
from fedtune.layout import fingerprint
from fedtune.models import load_model
from fedtune.resident import release
from fedtune.run_folder import RunFolder
from simulations.engines.flower_app import config_lines
from simulations.engines.in_process import run_in_process

RUNS: dict[str, dict[str, object]] = {
    "fedkseed": {"algorithm": "fedkseed", "K": 64, "lr": 1e-3, "local_steps": 5},
    "fedkseed bf16": {"algorithm": "fedkseed", "K": 64, "lr": 1e-3, "local_steps": 5, "dtype": "bfloat16"},
    "ferret, many pools": {"algorithm": "ferret", "K": 100, "lr": 1e-2, "local_steps": 3, "pool_every": 1, "rounds": 11},
    "ferret bf16, many pools": {
        "algorithm": "ferret", "K": 100, "lr": 1e-1, "local_steps": 3, "pool_every": 1, "rounds": 11, "dtype": "bfloat16",
    },
    "lowrank": {"algorithm": "fedkseed", "K": 64, "lr": 1e-3, "local_steps": 5, "family": "lowrank", "rank": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunFolder]]:
    """Run a method to its end, once."""
    place, done = tmp_path_factory.mktemp("runs"), dict[str, RunFolder]()

    def of(method: str, **changes: object) -> RunFolder:
        name = f"{method} {changes}"
        if name not in done:
            out = place / str(len(done))
            small = {
                "model": str(tiny_folder), "data": str(instructions), "out": str(out), "clients": 4, "clients_per_round": 2,
                "rounds": 2, "max_length": 64, "template": "plain", "min_samples": 2, "threads": 1, "device": "cpu",
                "holdout": 0.2, "eval_every": 0,
            }  # fmt: skip
            run_in_process(RunConfig.from_mapping({**small, **RUNS[method], **changes}))
            release()
            done[name] = RunFolder.open(out)
        return done[name]

    yield of
    release()


def loss_of(folder: Path, run: RunFolder) -> float:
    """The held-out loss of the model in `folder`, measured as the run measured its own."""
    config = run.config().replace(model=str(folder))
    lm = load_model(config)
    return evaluate(lm, load_federated(config, lm.tokenizer).heldout, config.eval_batch_size).loss


@pytest.mark.parametrize("method", RUNS)
def test_an_applied_delta_is_the_model_of_the_run_to_the_last_bit(
    fedtune: Callable[..., Outcome], runs: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    """From a fresh copy of the base, in the bits of the server's replica and in the last digit of the held-out loss."""
    run = runs(method)
    shutil.copytree(tiny_folder, tmp_path / "base")
    assert fedtune("export", str(run.path), "--format", "delta", "--out", "deep/f.safetensors").code == 0
    outcome = fedtune("apply", "base", "deep/f.safetensors", "--out", "tuned")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"digest {run.summary()['digest']} (verified)" in outcome.out
    tuned, _, _ = load_tuned(run)
    applied = load_model(RunConfig(model=str(tmp_path / "tuned"), dtype=run.config().dtype, device="cpu"))
    assert fingerprint(applied.model) == fingerprint(tuned.model)
    assert fingerprint(applied.model) != fingerprint(load_model(run.config()).model)
    assert loss_of(tmp_path / "tuned", run) == run.summary()["final_loss"]
    assert run.summary()["final_loss"] != run.summary()["initial_loss"]
    assert applied.tokenizer("abc").input_ids == tuned.tokenizer("abc").input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "deep", "tuned"]


def test_export_needs_no_weights_and_gives_the_same_bytes_again(
    fedtune: Callable[..., Outcome], runs: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path
) -> None:
    run = runs("ferret, many pools")
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    outcome = fedtune("export", str(run.path), "--format", "delta", "--out", "a.safetensors", "--model", str(bare))
    assert (outcome.code, outcome.err) == (0, "")
    assert "`fedtune apply BASE a.safetensors --out DIR`" in outcome.out
    assert fedtune("export", str(run.path), "--format", "delta", "--out", "b.safetensors").code == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    delta = read(tmp_path / "a.safetensors")
    assert (delta.base, delta.numbers, delta.pool_every) == (tiny_folder.name, tuple(range(11)), 1)
    assert delta.digest.hex() == run.summary()["digest"]


def test_the_best_round_and_what_is_in_the_way(
    fedtune: Callable[..., Outcome], runs: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path
) -> None:
    run = runs("fedkseed")
    assert fedtune("export", str(run.path), "--format", "delta", "--best", "--out", "best.safetensors").code == 0
    awkward = fedtune("export", str(run.path), "--format", "delta", "--out", "my delta's.safetensors")
    command = next(line.split("`")[1] for line in awkward.out.splitlines() if "`" in line)
    assert shlex.split(command) == ["fedtune", "apply", "BASE", "my delta's.safetensors", "--out", "DIR"]
    assert read(tmp_path / "best.safetensors").round == run.summary()["best_round"]
    again = fedtune("export", str(run.path), "--format", "delta", "--out", "best.safetensors")
    assert "'best.safetensors' exists already" in again.err
    (tmp_path / "file").write_text("")
    assert "could not be written" in fedtune("export", str(run.path), "--format", "delta", "--out", "file/x").err
    (tmp_path / "there").mkdir()
    assert "'there' exists already" in fedtune("apply", str(tiny_folder), "best.safetensors", "--out", "there").err
    assert "'none' cannot be read" in fedtune("apply", str(tiny_folder), "none", "--out", "x").err
    shutil.copytree(run.path, tmp_path / "damaged")
    (tmp_path / "damaged" / "coefficients.bin").write_bytes(b"FT")
    assert "coefficients.bin' is damaged" in fedtune("export", "damaged", "--format", "delta", "--out", "y").err


# ---------------------------------------------------------------------------------------------------- wrong bases


def changed_base(folder: Path, out: Path, dtype: torch.dtype = torch.float32, add: float = 0.0) -> Path:
    """A copy of the base with one weight changed, or stored in another precision."""
    shutil.copytree(folder, out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += add
    model.save_pretrained(out)
    return out


def larger_base(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (out / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(folder).config.__class__(**config)).save_pretrained(
        out
    )
    return out


def test_apply_refuses_a_wrong_base_and_writes_nothing(
    fedtune: Callable[..., Outcome], runs: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path
) -> None:
    assert fedtune("export", str(runs("fedkseed").path), "--format", "delta", "--out", "f").code == 0
    (tmp_path / "f").rename(tmp_path / "f.safetensors")
    wrong = {
        changed_base(
            tiny_folder, tmp_path / "tuned", add=1.0
        ): "its weights differ: give 'tiny0' as it was when the run started",
        changed_base(
            tiny_folder, tmp_path / "half", torch.bfloat16
        ): "its files are bfloat16, the run used float32; give 'tiny0'",
        larger_base(tiny_folder, tmp_path / "larger"): "has parameters of other names or shapes than the base of the delta",
    }
    for base, text in wrong.items():
        outcome = fedtune("apply", str(base), "f.safetensors", "--out", "x")
        assert outcome.code == 1
        assert text in outcome.err.replace(tiny_folder.name, "tiny0")
    outcome = fedtune("apply", str(tmp_path / "nowhere"), "f.safetensors", "--out", "x")
    assert "There is no model folder" in outcome.err
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / ".x.partial").exists()


def test_blocks_that_do_not_fit_are_refused(
    fedtune: Callable[..., Outcome], runs: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path
) -> None:
    """As if another version had grouped the parameters differently."""
    delta = delta_of_run(runs("ferret, many pools"))
    forged: list[Delta] = [replace(delta, layout=b"?" * 16), replace(delta, block_sizes=(1,) * len(delta.block_sizes))]
    for number, one in enumerate(forged):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(encode(one))
        outcome = fedtune("apply", str(tiny_folder), str(path), "--out", "x")
        assert "into other blocks than the one that wrote the delta: install fedtune" in outcome.err
    assert not (tmp_path / "x").exists()


def test_a_run_whose_base_became_another_model_is_not_exported(
    fedtune: Callable[..., Outcome], runs: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path
) -> None:
    other = larger_base(tiny_folder, tmp_path / "larger")
    outcome = fedtune("export", str(runs("fedkseed").path), "--format", "delta", "--out", "x", "--model", str(other))
    assert "is not the one that the run started from" in outcome.err


def test_a_full_disk_leaves_nothing(
    runs: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune import export
    from fedtune.errors import RunFolderError

    path = tmp_path / "f.safetensors"
    path.write_bytes(encode(delta_of_run(runs("fedkseed"))))

    def full(lm: object, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_save", full)
    with pytest.raises(RunFolderError, match="the disk is full"):
        apply_delta(str(tiny_folder), path, tmp_path / "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.safetensors"]


def test_the_loss_of_an_applied_delta_is_the_runs_to_the_last_digit(
    fedtune: Callable[..., Outcome], runs: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path
) -> None:
    run = runs("fedkseed")
    (tmp_path / "p.toml").write_text("\n".join(config_lines(run.config().replace(out="", resume=""))))
    assert fedtune("export", str(run.path), "--format", "delta", "--out", "f.safetensors").code == 0
    assert fedtune("apply", str(tiny_folder), "f.safetensors", "--out", "tuned").code == 0
    before, after = (last_json(fedtune("loss", "p.toml", "--json", *more).out) for more in ((), ("--model", "tuned")))
    assert before["loss"] == run.summary()["initial_loss"]
    assert after["loss"] == run.summary()["final_loss"] != before["loss"]
    assert repr(after["loss"]) in fedtune("loss", "p.toml", "--model", "tuned").out


def test_a_file_that_is_no_delta_is_refused_before_anything_is_announced(
    fedtune: Callable[..., Outcome], tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "f.safetensors").write_bytes(b"nothing")
    done = fedtune("apply", str(tiny_folder), "f.safetensors", "--out", "tuned")
    assert done.code == 1
    assert "rebuilding" not in done.out


# ---------------------------------------------------------------------------------------------------- show and diff


def test_show_says_what_is_in_it(
    fedtune: Callable[..., Outcome], runs: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path
) -> None:
    run = runs("lowrank")
    fedtune("export", str(run.path), "--format", "delta", "--out", "f.safetensors")
    numbers = last_json(fedtune("delta", "show", "f.safetensors", "--json").out)
    assert numbers["digest"] == run.summary()["digest"]
    assert (numbers["K"], numbers["pools"], numbers["family"]) == (64, 1, "lowrank of rank 2")
    assert numbers["parameters"] == run.summary()["parameters"]
    assert numbers["bytes"] == (tmp_path / "f.safetensors").stat().st_size
    text = fedtune("delta", "show", "f.safetensors").out
    assert tiny_folder.name in text
    assert "1-2" in text
    assert "is not a sound delta" in fedtune("delta", "show", str(run.path / "summary.json")).err


def test_the_norm_is_that_of_the_change_of_the_weights(runs: Callable[..., RunFolder], fedtune: Callable[..., Outcome]) -> None:
    """Expected over directions; exact to a few per cent for a model of 20,000 weights."""
    run = runs("fedkseed")
    tuned = torch.cat([weight.detach().reshape(-1) for weight in load_tuned(run)[0].model.parameters()])
    base = torch.cat([weight.detach().reshape(-1) for weight in load_model(run.config()).model.parameters()])
    found = last_json(fedtune("ledger", "diff", str(run.path), str(run.path), "--json").out)
    assert found["whole"]["norm_a"] == pytest.approx(float((tuned - base).norm()), rel=0.05)
    assert found["whole"]["cosine"] == pytest.approx(1.0)
    assert found["whole"]["distance"] == pytest.approx(0.0, abs=1e-9)


def test_diff_of_two_runs_and_of_a_file(
    fedtune: Callable[..., Outcome], runs: Callable[..., RunFolder], tmp_path: Path
) -> None:
    first, second = runs("fedkseed"), runs("fedkseed", local_steps=6)
    fedtune("export", str(second.path), "--format", "delta", "--out", "f.safetensors")
    numbers = last_json(fedtune("ledger", "diff", str(first.path), "f.safetensors", "--json").out)
    assert numbers["digests"] == [first.summary()["digest"], second.summary()["digest"]]
    assert 0.0 < numbers["whole"]["cosine"] < 1.0  # shared seeds, and a step more
    text = fedtune("ledger", "diff", str(first.path), "f.safetensors", "--blocks").out
    assert "|A - B|" in text
    assert "block 0" in text
    others = fedtune("ledger", "diff", str(first.path), str(runs("ferret, many pools").path)).err
    assert "into other blocks (one: 1, grouped:" in others
    half = fedtune("ledger", "diff", str(first.path), str(runs("fedkseed bf16").path)).err
    assert "only models over one base can be compared" in half


def test_diff_shows_each_pool_as_its_rounds(fedtune: Callable[..., Outcome], runs: Callable[..., RunFolder]) -> None:
    run = str(runs("ferret, many pools").path)
    pools = last_json(fedtune("ledger", "diff", run, run, "--json").out)["pools"]
    assert [pool["rounds"] for pool in pools] == [[number, number] for number in range(1, 12)]
    assert all(pool["whole"]["norm_a"] > 0 for pool in pools)
