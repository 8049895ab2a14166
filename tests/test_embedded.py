"""What ships with fedtune is found without running the package that holds it."""

from __future__ import annotations

import sys

import pytest

from fedtune.config import RunConfig
from fedtune.data.samples import load_samples
from fedtune.embedded import embedded_path
from fedtune.errors import ConfigError


def test_the_embedded_tasks_are_instructions_with_categories() -> None:
    samples, notes = load_samples("embedded", RunConfig(), needs_category=True)
    assert notes == ()
    assert all(sample.instruction and sample.output and sample.category for sample in samples)


def test_a_missing_part_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"'embedded' needs simulations/embedded/nothing, which this installation lacks: install"
    ):
        embedded_path("nothing")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.embedded.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"which this installation lacks"):
        embedded_path("tasks.jsonl")


def test_no_code_of_the_package_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "simulations.embedded", raising=False)
    assert embedded_path("tasks.jsonl").is_file()
    assert "simulations.embedded" not in sys.modules
