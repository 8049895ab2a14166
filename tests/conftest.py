"""What many tests share: a tiny random Llama with a byte tokenizer, a small file of instructions, the shared data folder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune import ledger_file
from fedtune.config import RunConfig
from fedtune.models import LanguageModel, load_model

settings.register_profile("fedtune", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedtune")  # a busy machine is no fault of what is tested

CATEGORIES = ("colours", "numbers", "shapes", "sizes")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _nothing_flushed() -> Iterator[None]:
    """In the tests' own processes nothing waits for the disk: no test cuts the power, and a process that dies loses nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(ledger_file, "FLUSHED", "PRAGMA synchronous = OFF")
        yield


@pytest.fixture(scope="session", autouse=True)
def _usual_signals() -> None:
    """Signals as in a terminal, also where the tests run in the background (&, nohup) and inherit ignored ones."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of about 20,000 parameters (tied embeddings) and its byte tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (<pad> 0, <s> 1, </s> 2, then 256 bytes); texts begin with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@pytest.fixture
def tiny_lm(tiny_folder: Path) -> LanguageModel:
    """The tiny model, loaded afresh for the test."""
    return load_model(RunConfig(model=str(tiny_folder), device="cpu", threads=1))


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 80 short instructions: 20 rows of each of four categories in turn, every fifth row with an input."""
    path = tmp_path_factory.mktemp("data") / "instructions.jsonl"
    rows = [
        {
            "instruction": f"Name {CATEGORIES[row % 4]} number {row}.",
            "input": f"list {row}" if row % 5 == 0 else "",
            "output": f"{CATEGORIES[row % 4][:3]} {row * 7 % 13}",
            "category": CATEGORIES[row % 4],
        }
        for row in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, a real small model and traces of the official codes; skips where it is not."""
    folder = Path(os.environ.get("FEDTUNE_SHARED", "../shared"))
    if not (folder / "models" / "stories260K").is_dir():
        pytest.skip(f"no shared data at '{folder}': set FEDTUNE_SHARED to the folder with models/, data/ and reference/")
    return folder
