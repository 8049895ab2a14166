"""The base model: what is accepted, what is refused with which words, and which choices are noted."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

from fedtune import models
from fedtune.config import RunConfig
from fedtune.errors import ModelError
from fedtune.models import SMALL_MODEL, choose_device, choose_threads, load_model, resolve_model


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def load(folder: Path | str, **settings: object) -> models.LanguageModel:
    return load_model(RunConfig.from_mapping({"model": str(folder), "device": "cpu", **settings}))


def edit_json(path: Path, **changes: object) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_a_loaded_model_is_ready_and_its_choices_are_noted(tiny_folder: Path) -> None:
    lm = load(tiny_folder)
    assert not lm.model.training
    assert lm.model.config.use_cache is False
    assert lm.source == str(tiny_folder)
    assert lm.notes == (
        f"model: {tiny_folder} ({sum(p.numel() for p in lm.model.parameters()):,} parameters, float32)",
        "device: cpu (as asked)",
        "threads: 1 (below 20 million parameters more threads do not pay)",
    )
    assert torch.get_num_threads() == 1


def test_weights_are_those_in_the_files_and_tied_ones_stay_tied(tiny_folder: Path) -> None:
    lm = load(tiny_folder)
    expected = LlamaForCausalLM.from_pretrained(tiny_folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in lm.model.state_dict().items())
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(lm.model.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_weights_have_the_dtype_asked_for(tiny_folder: Path, dtype: str) -> None:
    assert {p.dtype for p in load(tiny_folder, dtype=dtype).model.parameters()} == {getattr(torch, dtype)}


def test_loading_says_nothing_and_leaves_logging_as_it_was(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger("transformers").level
    load(tiny_folder)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").level == before


def test_pickled_weights_are_refused_before_they_are_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ModelError, match=r"has only pickled weights \(pytorch_model.bin\), which can run code when loaded"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"There is no model folder './nowhere': correct the path, or give a hub name such as org/name\."),
        ("/no/such/model", r"There is no model folder '/no/such/model'"),
        ("/no/fedtune/models/smollm2", r"make it \(`python -m simulations.models.smollm2`\), or give a hub name"),
    ],
)
def test_a_missing_folder_is_named_with_the_fix(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(name)


def test_a_hub_name_without_connection_fails_quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(
        ModelError, match=r"no folder 'someorg/no-such-model', and the hub cannot be reached.*give a local folder"
    ):
        load("someorg/no-such-model")
    assert time.monotonic() - started < 3


def test_a_file_is_not_a_model(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"is a file: give the folder with config.json"):
        load(folder / "config.json")


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", r"has no config.json: give a folder written by save_pretrained"),
        ("model.safetensors", r"has no weights: a \*\.safetensors file was expected"),
        ("tokenizer.json", r"The tokenizer of .* cannot be loaded .*put tokenizer.json and tokenizer_config.json"),
    ],
)
def test_an_incomplete_folder_is_refused(folder: Path, removed: str, message: str) -> None:
    (folder / removed).unlink()
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_a_model_that_is_not_causal_is_refused(folder: Path) -> None:
    config = BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"is a BertForMaskedLM, not a causal language model: give one whose architecture ends in"
    ):
        load(folder)


def test_an_unknown_model_type_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="never-heard-of")
    with pytest.raises(ModelError, match=r"The configuration of .* cannot be used .*model type that transformers knows"):
        load(folder)


def test_code_that_comes_with_a_model_is_not_run_unless_asked(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('this code must not run')")
    edit_json(
        folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    )
    with pytest.raises(ModelError, match=r"set trust_remote_code = true if you trust it"):
        load(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ModelError, match=r"is quantised, and fedtune tunes all weights"):
        load(folder)


def test_weights_that_lack_tensors_are_refused_rather_than_drawn_at_random(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lack 9 tensors of its architecture.*first: model\.layers\.2\."):
        load(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"The weights of .* cannot be loaded .*: get them again"):
        load(folder)


def test_weights_that_no_module_uses_are_noted(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1)
    assert any(note.startswith("weights: 9 tensors in the files belong to no module") for note in load(folder).notes)


def test_end_of_text_pads_where_there_is_no_padding_token(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    lm = load(folder)
    assert lm.tokenizer.pad_token_id == lm.tokenizer.eos_token_id == 2
    assert len(lm.tokenizer) == lm.model.get_input_embeddings().weight.shape[0]
    assert lm.notes[-1].startswith("padding: </s> (the tokenizer has no padding token that the model knows")


def test_a_padding_token_beyond_the_embeddings_is_not_used(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token="[PAD]")
    assert load(folder).tokenizer.pad_token == "</s>"


def test_a_tokenizer_without_end_of_text_is_refused(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match=r"has no end-of-text token, which every response ends with"):
        load(folder)


def test_more_tokens_than_positions_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"max_length = 513, but .* has 512 positions: set max_length to 512 or less\."):
        load(tiny_folder, max_length=513)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", "is not on this machine"), ("toaster", "is not a device: use auto, cpu"), ("meta", "is not on this machine")],
)
def test_a_device_that_is_not_there_is_refused(device: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        choose_device(device)


def test_the_device_comes_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == (torch.device("cpu"), "device: cpu (there is no CUDA or MPS device)")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == (torch.device("mps"), "device: mps (available, and there is no CUDA device)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU X")
    assert choose_device("auto") == (torch.device("cuda", 0), "device: cuda:0 (GPU X is available)")


def test_threads_follow_the_size_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert choose_threads(0, SMALL_MODEL - 1)[0] == 1
    assert choose_threads(0, SMALL_MODEL) == (3, "threads: 3 (all cores that this process may use)")
    assert choose_threads(5, 10) == (5, "threads: 5 (as asked)")


def test_names_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_TEST_MODELS", "/models")
    assert resolve_model("${FEDTUNE_TEST_MODELS}/a") == "/models/a"
    assert resolve_model("org/name") == "org/name"


def test_the_real_small_model_loads(shared: Path) -> None:
    lm = load(shared / "models" / "stories260K")
    assert sum(p.numel() for p in lm.model.parameters()) == 260_032
    assert lm.tokenizer.pad_token_id == 0
