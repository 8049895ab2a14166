"""Fixtures of the command line's tests: run a command, and an engine that plays back events instead of training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from playback import Outcome, play

from fedtune import progress
from fedtune.cli import main
from fedtune.config import RunConfig


@pytest.fixture
def fedtune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Outcome]:
    """Call the command line in an empty working directory: fedtune("simulate", "x") -> Outcome."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        printed = capsys.readouterr()
        code = stop.value.code
        assert isinstance(code, int)
        return Outcome(code, printed.out, printed.err)

    return call


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunConfig]]:
    """Stand in for both engines with `play`; the list collects the configs they were given."""
    seen: list[RunConfig] = []

    def run_in_process(config: RunConfig) -> dict[str, object]:
        seen.append(config)
        return play(config)

    def run_flower(config: RunConfig, workers: int) -> dict[str, object]:
        seen.append(config.replace(threads=workers))
        return play(config)

    for name, function in (("in_process", run_in_process), ("flower", run_flower)):
        module = ModuleType(f"simulations.engines.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield seen
    progress.clear_stop()


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A small preset in the working directory."""
    path = tmp_path / "small.toml"
    path.write_text("# Small\nrounds = 2\nclients = 4\nclients_per_round = 2\nlocal_steps = 3\n")
    return path
