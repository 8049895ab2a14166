"""Where a model lives: offloaded to host memory, spread by accelerate, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import RunConfig
from fedtune.errors import ModelError
from fedtune.models import LanguageModel, load_model
from fedtune.placement import loading_options, place
from fedtune.resident import Resident
from tests.laws.federation import config, run


def test_one_device_needs_nothing(tiny_lm: LanguageModel) -> None:
    assert loading_options(RunConfig()) == {}
    device, note = place(tiny_lm.model, RunConfig(), torch.device("cpu"))
    assert (device.type, note) == ("cpu", "")


def test_offloading_leaves_the_weights_and_moves_the_rest(tiny_lm: LanguageModel) -> None:
    elsewhere = torch.device("meta")  # a device that is always there, though it cannot compute
    device, note = place(tiny_lm.model, RunConfig(offload=True), elsewhere)
    assert device == elsewhere
    assert "weights in host memory, brought to meta module by module" in note
    assert all(parameter.device.type == "cpu" for parameter in tiny_lm.model.parameters())
    buffers = list(tiny_lm.model.buffers())
    assert buffers
    assert all(buffer.device == elsewhere for buffer in buffers)


def test_offloading_on_the_cpu_changes_nothing_and_says_so(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    lm = load_model(RunConfig(model=str(tiny_folder), device="cpu", offload=True))
    assert "offload: not needed, the device is the CPU" in lm.notes
    assert Resident(RunConfig(model=str(tiny_folder), device="cpu", offload=True)).replica.perturbation.device is None
    runs = [
        run(config("fedkseed", tiny_folder, instructions, tmp_path / name, device="cpu", rounds=2, offload=offload))
        for name, offload in (("plain", False), ("offloaded", True))
    ]
    assert runs[0].digests == runs[1].digests


def test_accelerate_spreads_the_layers(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    lm = load_model(RunConfig(model=str(tiny_folder), device_map="auto"))
    assert any(note.startswith("device_map: auto, layers on ") for note in lm.notes)
    runs = [
        run(config("ferret", tiny_folder, instructions, tmp_path / name, rounds=2, device_map=name))
        for name in ("none", "sequential")
    ]
    assert runs[0].digests == runs[1].digests


def test_accelerate_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(ModelError, match=r"device_map = auto needs accelerate, .* pip install 'fedtune\[multi-gpu\]'"):
        loading_options(RunConfig(device_map="auto"))


def test_layers_that_do_not_fit_the_gpus_are_named(tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and yet the weights are in host memory
    with pytest.raises(ModelError, match=r"'model\.embed_tokens\.weight' does not fit the GPUs.* offload = true instead"):
        place(tiny_lm.model, RunConfig(device_map="auto"), torch.device("cpu"))
