"""Layout: canonical order, blocks, positions that never overlap a tile, and fingerprints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedtune.config import RunConfig
from fedtune.errors import ModelError
from fedtune.layout import ALIGN, Layout, fingerprint, trainable
from fedtune.models import LanguageModel, load_model


def test_positions_are_aligned_and_apart(tiny_lm: LanguageModel) -> None:
    layout = Layout.of(tiny_lm.model)
    assert [entry.name for entry in layout.entries] == [name for name, _ in trainable(tiny_lm.model)]
    assert layout.numel == sum(p.numel() for p in tiny_lm.model.parameters())
    for before, after in zip(layout.entries, layout.entries[1:], strict=False):
        assert after.origin % ALIGN == 0
        assert after.origin >= before.origin + before.numel


def test_tied_tensors_have_one_place(tiny_lm: LanguageModel) -> None:
    names = [entry.name for entry in Layout.of(tiny_lm.model).entries]
    assert tiny_lm.model.lm_head.weight is tiny_lm.model.model.embed_tokens.weight
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_grouped_blocks_are_those_of_the_official_code(shared: Path) -> None:
    recorded = json.loads((shared / "reference" / "ferret_official.json").read_text())
    model = load_model(RunConfig(model=str(shared / "models" / "stories260K"), device="cpu")).model
    layout = Layout.of(model, "grouped")
    groups: list[list[str]] = [[] for _ in range(layout.blocks)]
    for entry in layout.entries:
        groups[entry.block].append(entry.name)
    assert groups == recorded["group_names"]
    assert list(layout.block_sizes) == recorded["group_sizes"]


@pytest.mark.parametrize(("rule", "blocks"), [("one", 1), ("tensor", 4), ("grouped", 3)])
def test_block_rules(rule: str, blocks: int) -> None:
    layout = Layout.from_shapes([("a", (100,)), ("b", (4,)), ("c", (5,)), ("d", (10, 10))], rule)
    assert layout.blocks == blocks
    assert sum(layout.block_sizes) == layout.numel == 209


def test_a_fingerprint_names_the_weights(tiny_folder: Path) -> None:
    config = RunConfig(model=str(tiny_folder), device="cpu", threads=1)
    model = load_model(config).model
    before = fingerprint(model)
    assert before == fingerprint(load_model(config).model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[7] += 1e-6
    assert fingerprint(model) != before
    assert fingerprint(load_model(config.replace(dtype="bfloat16")).model) != before


def test_what_cannot_be_tuned_is_refused() -> None:
    frozen = torch.nn.Linear(2, 2)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameter"):
        trainable(frozen)
    with pytest.raises(ModelError, match=r"'weight' is torch\.float64"):
        trainable(torch.nn.Linear(2, 2).double())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_and_counted(tiny_lm: LanguageModel, value: float) -> None:
    """In a frozen tensor as in a trained one."""
    named = dict(tiny_lm.model.named_parameters())
    with torch.no_grad():
        named["model.norm.weight"][[3, 5]] = value
    with pytest.raises(ModelError, match=r"2 of 32 weights of 'model\.norm\.weight' are NaN or infinite\. .*again\.$") as one:
        fingerprint(tiny_lm.model)
    assert one.value.facts["tensors"] == {"model.norm.weight": 2}
    named["model.norm.weight"].requires_grad_(False)
    with torch.no_grad():
        named["model.embed_tokens.weight"].view(-1)[0] = value
    with pytest.raises(ModelError, match=r"'model\.embed_tokens\.weight' are NaN or infinite, and 1 more tensors have such"):
        fingerprint(tiny_lm.model)


def test_weights_that_overflow_in_their_dtype_are_told_from_damaged_ones(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(RunConfig(model=str(tiny_folder), device="cpu", threads=1)).model
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[7] = 1e6
    assert fingerprint(model)
    with pytest.raises(ModelError, match=r"1 of 32 weights .* set dtype = float32 .* \(up to 65504\)"):
        fingerprint(model.to(torch.float16))
