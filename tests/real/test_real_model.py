"""A model of 135 million parameters from end to end: what works on a megabyte must work on half a gigabyte.

    python -m pytest -m real

takes ten minutes on two cores and 4 GB of memory; `make test-deployment` leaves out what is marked `large`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.apply import apply_delta
from fedtune.export import export_delta, export_run
from fedtune.ledger import Ledger
from fedtune.run_folder import RunFolder
from fedtune.verify import verify

pytestmark = pytest.mark.real

SMALL = {
    "clients": 4, "clients_per_round": 2, "local_steps": 2, "batch_size": 1, "max_length": 96, "min_samples": 2, "seed": 3,
    "holdout": 0.2, "eval_samples": 8, "eval_batch_size": 4, "generate_samples": 2, "max_new_tokens": 8, "template": "plain",
}  # fmt: skip
WAYS: Mapping[str, Mapping[str, object]] = {
    "ferret": {"algorithm": "ferret", "lr": 1e-3, "K": 512},
    "fedkseed": {"algorithm": "fedkseed", "lr": 1e-6, "K": 64},
    "fedavg": {"algorithm": "fedavg", "lr": 1e-3},
    "lora": {"algorithm": "lora", "lr": 1e-2, "lora_rank": 4},
}


def fedtune(*arguments: str) -> dict[str, Any]:
    """The last line that a command prints, which is JSON. In a process of its own: its memory is measured."""
    done = subprocess.run([sys.executable, "-m", "fedtune.cli", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def preset(folder: Path, **settings: object) -> str:
    """A preset file; text, numbers and booleans are written in JSON as in TOML."""
    path = folder / "preset.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8")
    return str(path)


MORE = [
    pytest.param(*pair, marks=pytest.mark.large) for pair in (("ferret", "float32"), ("fedavg", "float32"), ("lora", "float32"))
]


@pytest.mark.parametrize(("way", "dtype"), [("ferret", "bfloat16"), ("fedkseed", "bfloat16"), *MORE])
def test_two_rounds_are_estimated_run_resumed_exported_and_applied(
    way: str, dtype: str, smollm2: Path, instructions: Path, tmp_path: Path
) -> None:
    """The peak is what `estimate` said, within 15 %; the digest of the model is the same wherever it is made."""
    asked = preset(tmp_path, model=str(smollm2), data=str(instructions), dtype=dtype, rounds=1, **SMALL, **WAYS[way])
    out = str(tmp_path / "run")
    estimated = fedtune("estimate", asked, "--json")
    before = fedtune("simulate", asked, "--out", out, "--json")
    after = fedtune("simulate", "--resume", out, "--set", "rounds=2", "--json")
    peak = max(before["peak_memory_bytes"], after["peak_memory_bytes"])  # the first instruction is empty
    assert peak == pytest.approx(estimated["peak"], rel=0.15)
    assert after["digest"] != before["digest"]
    run = RunFolder.open(out)
    with Ledger.open(run.path) as ledger:
        assert verify(ledger).digest == after["digest"]
    assert export_run(run, tmp_path / "tuned").digest == after["digest"]
    if way in ("ferret", "fedkseed"):  # the others have no coefficients over directions to send
        export_delta(run, tmp_path / "tuned.delta")
        applied = apply_delta(str(smollm2), tmp_path / "tuned.delta", tmp_path / "applied")
        assert applied.digest == after["digest"]
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "applied" / name).read_bytes() == (tmp_path / "tuned" / name).read_bytes()


@pytest.mark.large
@pytest.mark.parametrize("way", ["ferret", "fedkseed"])
def test_a_vocabulary_of_150_000_needs_what_was_estimated(way: str, smollm2: Path, instructions: Path, tmp_path: Path) -> None:
    """Logits of a whole batch would take as much as the model: 4 x 96 x 150,000 numbers, 230 MB, in each of several copies."""
    import shutil

    model = tmp_path / "wide"
    shutil.copytree(smollm2, model)
    (model / "model.safetensors").unlink()
    config = LlamaConfig(
        vocab_size=150_000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(model)
    asked = preset(tmp_path, model=str(model), data=str(instructions), rounds=1, **SMALL, **WAYS[way])
    estimated = fedtune("estimate", asked, "--json")
    found = fedtune("simulate", asked, "--out", str(tmp_path / "run"), "--json")
    assert found["peak_memory_bytes"] == pytest.approx(estimated["peak"], rel=0.15)
