"""A finished run that tests damage, and what a command on it may end with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from limits import Told, in_time

from fedtune.cli import main
from fedtune.run_folder import RunFolder
from tests.laws.federation import config, run


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two rounds. Read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    quick = {"rounds": 2, "eval_samples": 4, "local_steps": 2, "generate_samples": 1, "max_new_tokens": 2, "pool_every": 1}
    run(config("fedkseed-pro", tiny_folder, instructions, folder, **quick))
    RunFolder(folder).write_json("error.json", {"type": "DivergedError", "message": "made up"})
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Told:
    """Run a command; it ends in time, with success or a sentence that we wrote, which is returned ("" for success)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        with in_time(), pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert stop.value.code in (0, 1), said
        assert "Unexpected" not in said, said
        assert stop.value.code == 0 or "Error: " in said
        return said if stop.value.code else ""

    return call
