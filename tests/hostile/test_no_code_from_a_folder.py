"""Nothing in a run folder, a ledger or a delta runs code or fetches anything: only who gives the command decides."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path

import forge
import pytest
from limits import Told

from fedtune.chain import as_text
from fedtune.config import RunConfig
from fedtune.ledger import Ledger
from fedtune.ledger_file import LEDGER
from fedtune.run_folder import RunFolder
from fedtune.trust import said_now
from simulations.engines.flower_app import config_lines

MARKER = "ran.txt"
CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / MARKER


@pytest.fixture
def own_code(tiny_folder: Path, tmp_path: Path, marker: Path) -> Path:
    """The tiny model as one that comes with code, which leaves a file when it runs."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "own"))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    stored = json.loads((folder / "config.json").read_text())
    stored |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


def says(folder: Path, **settings: object) -> None:
    """Change settings of the run, in config.json and in the ledger."""
    stored = RunFolder(folder).read_object("config.json")
    stored["used"] |= settings
    RunFolder(folder).write_json("config.json", stored)
    with Ledger.open(folder) as ledger:
        used = dict(ledger.header.used) | settings
    forge.change(folder / LEDGER, lambda raw: raw.execute("UPDATE header SET used = ?", (as_text(used),)))


def test_a_folder_that_trusts_its_own_code_does_not_run_it(
    folder: Path, own_code: Path, marker: Path, told: Told, tmp_path: Path
) -> None:
    says(folder, model=str(own_code), trust_remote_code=True)
    for command, again in (
        (("export", folder, "--out", tmp_path / "x"), "--trust-remote-code"),
        (("export", folder, "--format", "delta", "--out", tmp_path / "x"), "--trust-remote-code"),
        (("simulate", "--resume", folder), "--set trust_remote_code=true"),
    ):
        said = told(*command)
        assert "trust_remote_code = true" in said
        assert again in said
    for command in (("ledger", "diff", folder, folder), ("report", folder), ("ledger", "verify", folder), ("status", folder)):
        told(*command)
    assert not marker.exists()
    told("export", folder, "--out", tmp_path / "x", "--trust-remote-code")
    assert marker.exists(), "the model of this test has no code that would run"


def test_a_run_that_died_before_its_ledger_does_not_decide_either(
    folder: Path, own_code: Path, marker: Path, told: Told
) -> None:
    says(folder, model=str(own_code), trust_remote_code=True)
    for name in (LEDGER, "metrics.jsonl"):
        (folder / name).unlink()
    assert told("simulate", "--resume", folder, "--quiet")
    assert not marker.exists()


def test_loss_and_apply_run_no_code_of_the_model_they_are_given(
    folder: Path, own_code: Path, marker: Path, told: Told, tmp_path: Path
) -> None:
    """A preset that trusts its own model does not trust the one of --model."""
    config = RunFolder(folder).config().replace(out="", trust_remote_code=True)
    (tmp_path / "preset.toml").write_text("\n".join(config_lines(config)))
    assert "trust_remote_code" in told("loss", "preset.toml", "--model", own_code)
    told("export", folder, "--format", "delta", "--out", tmp_path / "delta")
    assert "trust_remote_code" in told("apply", own_code, tmp_path / "delta", "--out", tmp_path / "y")
    assert not marker.exists()
    told("loss", "preset.toml", "--model", own_code, "--trust-remote-code")
    assert marker.exists()


def test_what_only_a_folder_names_is_not_fetched(
    folder: Path, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the hub was asked for {args}")

    for place in ("fedtune.models.snapshot_download", "fedtune.architecture.hf_hub_download"):
        monkeypatch.setattr(place, fetched)
    monkeypatch.setenv("A_SECRET", "someorg/secret")
    for name in ("someorg/somemodel", "${A_SECRET}"):
        says(folder, model=name)
        for command in (
            ("export", folder, "--out", tmp_path / "x"),
            ("export", folder, "--format", "delta", "--out", tmp_path / "x"),
            ("ledger", "diff", folder, folder),
            ("simulate", "--resume", folder),
        ):
            said = told(*command)
            assert "nothing is fetched because a folder names it" in said
            assert "someorg/secret" not in said


def test_data_of_the_hub_is_named_again(folder: Path, told: Told) -> None:
    says(folder, data="hub:someorg/somedata")
    assert "--set data=hub:someorg/somedata" in told("simulate", "--resume", folder)


def test_data_that_is_no_file_is_refused(folder: Path, told: Told, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "device.jsonl"):
        says(folder, data=str(tmp_path / name))
        assert "cannot be read: it is a" in told("simulate", "--resume", folder)


def test_a_revision_goes_with_the_model_that_is_named() -> None:
    stored = RunConfig(model="org/theirs", revision="refs/pr/1", trust_remote_code=True)
    now = said_now(stored, {"model": "org/mine"})
    assert (now.model, now.revision, now.trust_remote_code) == ("org/mine", "", False)
    assert said_now(stored, {"model": "org/mine", "trust_remote_code": True}).trust_remote_code


def test_the_name_of_a_base_model_in_a_delta_has_no_variable_of_ours(
    folder: Path, told: Told, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "value-of-the-secret")
    says(folder, model="${A_SECRET}")
    assert not told("export", folder, "--format", "delta", "--model", tiny_folder, "--out", tmp_path / "delta")
    assert b"value-of-the-secret" not in (tmp_path / "delta").read_bytes()


def test_a_model_folder_that_brings_a_kernel_or_another_base_is_refused(
    folder: Path, tiny_folder: Path, told: Told, tmp_path: Path
) -> None:
    kernel = Path(shutil.copytree(tiny_folder, tmp_path / "kernel"))
    stored = json.loads((kernel / "config.json").read_text())
    (kernel / "config.json").write_text(json.dumps({**stored, "attn_implementation": "someorg/kernel"}))
    adapter = Path(shutil.copytree(tiny_folder, tmp_path / "adapter"))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someorg/other", "peft_type": "LORA"}))
    assert "names a kernel of the hub ('someorg/kernel')" in told("export", folder, "--model", kernel, "--out", tmp_path / "x")
    assert "would bring another base model" in told("export", folder, "--model", adapter, "--out", tmp_path / "x")


def test_sqlite_was_not_asked_to_run_anything(folder: Path, told: Told) -> None:
    """A view or a trigger in place of a table is refused by every command."""
    raw = sqlite3.connect(folder / LEDGER)
    raw.execute("ALTER TABLE pools RENAME TO pools_2")
    raw.execute("CREATE VIEW pools AS SELECT number, coefficients FROM pools_2")
    raw.commit()
    raw.close()
    for command in (("ledger", "show"), ("ledger", "verify"), ("status",), ("simulate", "--resume")):
        assert "does not have the tables" in told(*command, folder)
