"""Tensors at rest: where they are found, that they are the same bits, and what happens when the disk does not play along."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from fedtune.at_rest import AtRest
from fedtune.errors import ModelError
from fedtune.layout import trainable
from fedtune.models import LanguageModel
from fedtune.scratch import nameless_file

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedtune"


def same(stored: AtRest, model: torch.nn.Module) -> bool:
    return all(torch.equal(tensor, weight) for tensor, (_, weight) in zip(stored.tensors, trainable(model), strict=True))


def test_the_base_is_mapped_from_the_model_folder(tiny_lm: LanguageModel, cache: Path) -> None:
    stored = AtRest.copy_of(trainable(tiny_lm.model), tiny_lm.folder, in_memory=0)
    assert stored.in_memory == 0
    assert not cache.exists()
    assert same(stored, tiny_lm.model)


def test_a_mapped_base_stays_when_the_live_weights_are_written(tiny_lm: LanguageModel) -> None:
    before = [weight.detach().clone() for _, weight in trainable(tiny_lm.model)]
    stored = AtRest.copy_of(trainable(tiny_lm.model), tiny_lm.folder)
    with torch.no_grad():
        for _, weight in trainable(tiny_lm.model):
            weight.fill_(7.0)
    for index in range(len(stored)):
        stored.release(index)
    assert all(torch.equal(one, other) for one, other in zip(stored.tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_converted_goes_to_anameless_file_without_a_name(
    tiny_lm: LanguageModel, dtype: torch.dtype, cache: Path
) -> None:
    model = tiny_lm.model.to(dtype)
    stored = AtRest.copy_of(trainable(model), tiny_lm.folder, in_memory=0)
    assert stored.in_memory == 0
    assert cache.exists()
    assert not list(cache.iterdir())
    assert same(stored, model)


def test_what_is_small_and_not_in_the_folder_stays_in_memory(tiny_lm: LanguageModel, cache: Path) -> None:
    model = tiny_lm.model.to(torch.bfloat16)
    stored = AtRest.copy_of(trainable(model), tiny_lm.folder)
    assert stored.in_memory == 2 * sum(weight.numel() for _, weight in trainable(model))
    assert not cache.exists()


def test_a_tensor_with_other_bits_or_of_another_name_is_not_taken_from_the_folder(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    """As when a loader renames, merges or rescales: only what is bit by bit the same is mapped."""
    named = trainable(tiny_lm.model)
    assert tiny_lm.folder is not None
    tensors = load_file(tiny_lm.folder / "model.safetensors")
    changed, renamed = named[0][0], named[1][0]
    tensors[changed] = tensors[changed] + 1.0
    tensors["other"] = tensors.pop(renamed)
    save_file(tensors, tmp_path / "model.safetensors")
    stored = AtRest.copy_of(named, tmp_path)
    assert stored.in_memory == sum(4 * named[i][1].numel() for i in (0, 1))
    assert same(stored, tiny_lm.model)


def test_sharded_folders_are_mapped_too(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    model = tiny_lm.model
    assert isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    stored = AtRest.copy_of(trainable(model), tmp_path, in_memory=0)
    assert stored.in_memory == 0
    assert same(stored, model)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]", b'\x09\0\0\0\0\0\0\0{"a": {}}'])
def test_files_that_are_no_safetensors_are_passed_over(tiny_lm: LanguageModel, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    stored = AtRest.copy_of(trainable(tiny_lm.model), tmp_path)
    assert same(stored, tiny_lm.model)
    assert stored.in_memory > 0


def test_a_blank_keeps_what_is_written_when_its_pages_are_given_back(cache: Path) -> None:
    kinds = [((1024, 1024), torch.float32), ((3,), torch.bfloat16), ((0, 4), torch.float32)]
    stored = AtRest.blank(kinds, in_memory=0)
    for number, tensor in enumerate(stored.tensors):
        tensor.fill_(float(number + 1))
    for index in range(len(stored)):
        stored.release(index)
    assert [tuple(tensor.shape) for tensor in stored.tensors] == [shape for shape, _ in kinds]
    assert all(bool((tensor == number + 1).all()) for number, tensor in enumerate(stored.tensors))


def test_a_model_file_that_changes_under_a_run_is_an_error(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    model = tiny_lm.model
    assert isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path)
    stored = AtRest.copy_of(trainable(model), tmp_path)
    stored.check()
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with pytest.raises(ModelError, match="changed while its weights are in use"):
        stored.check()


def test_a_full_disk_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedtune.scratch._allocate", full)
    with pytest.raises(ModelError, match=r"needs 4,096 bytes of disk in .*No space left.*XDG_CACHE_HOME") as error:
        AtRest.blank([((1024,), torch.float32)], in_memory=0)
    assert error.value.facts == {"folder": str(cache), "bytes": 4096}


def test_a_cache_that_cannot_be_written_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="Not a directory"):
        nameless_file(64)
