"""Pretrains the embedded model: a tokenizer and a Llama of 0.4 million parameters, from generated tasks, with one command.

    python -m simulations.embedded.pretrain            # writes simulations/embedded/model; about ten minutes on one free core

The loss is taken on the responses. Most batches have the form of the tokenizer's chat template, the others those of
fedtune's other templates, so that the model can be used with each. Every draw comes from a named stream or a seeded
generator and one thread computes, so the same versions on the same machine give the same model.

The model answers 97 of 100 terse questions exactly, averaged over tasks; the weak tasks are "drop first" (63) and
"odd one out" (72). The last line that is printed lists all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from fedtune.data.batches import Batch, collate
from fedtune.data.encode import encode
from fedtune.data.templates import renderer
from fedtune.evaluation import greedy_texts, response_loss
from fedtune.models import LanguageModel
from simulations.embedded.tasks import TASKS, Draws, pretraining_samples

MODEL_FOLDER = Path(__file__).with_name("model")
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}</s>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = ("chat",) * 16 + ("alpaca", "alpaca", "fedkseed", "plain")
VOCABULARY = 768
LONGEST = 256  # tokens of a row, and positions of the model
TOKENIZER_SEED, TRAINING_SEED, CHECK_SEED = 1, 2, 3


def train_tokenizer(rows: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-pair encoding of the generated text, of printable ASCII. Every word starts with a space, also at the start."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(  # so also after a line break, and after the end of alpaca's prompt
        [normalizers.Replace(Regex(r"\n+(?=\S)"), "\n "), normalizers.Replace(Regex(r"### Response:(?=\S)"), "### Response: ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    printable = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # Ġ, Ċ: how ByteLevel spells space and newline
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIALS), initial_alphabet=printable, show_progress=False
    )
    tokens = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIALS, strict=False))
    empty = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    render = renderer("alpaca", empty)
    samples = islice(pretraining_samples(TOKENIZER_SEED), rows)
    texts = (
        render(s).prompt + "\n" + s.output if i % 10 == 0 else f"{s.instruction}\n{s.input}\n{s.output}"
        for i, s in enumerate(samples)
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **tokens)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, its start drawn from torch's generator (seed 0, CPU)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LONGEST, tie_word_embeddings=True, rope_theta=1000.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, size: int) -> Iterator[Batch]:
    """Endless batches of `size` samples; those of a batch share a template, drawn from TEMPLATES."""
    samples, d = pretraining_samples(TRAINING_SEED), Draws("templates", TRAINING_SEED)
    while True:
        encoded = encode(list(islice(samples, size)), tokenizer, d.pick(TEMPLATES), LONGEST)
        yield collate(encoded.usable, tokenizer.pad_token_id)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, batch_size: int, peak: float) -> None:
    """AdamW; the learning rate rises over 200 steps to `peak` and falls to zero along a cosine. Prints its progress."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    started, recent = time.perf_counter(), 0.0
    for step, batch in zip(range(1, steps + 1), batches(tokenizer, batch_size), strict=False):
        rate = peak * min(step / 200, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = response_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        if step % 200 == 0:
            print(f"step {step:5d} of {steps}  loss {recent:.4f}  {time.perf_counter() - started:5.0f} s", flush=True)


def exact_matches(lm: LanguageModel, count: int) -> dict[str, float]:
    """Share of terse questions answered exactly (greedy, chat template) by task, on `count` samples of a fresh stream."""
    terse = (sample for sample in pretraining_samples(CHECK_SEED) if not sample.output.endswith("."))
    samples = list(islice(terse, count))
    encoded = encode(samples, lm.tokenizer, "chat", LONGEST).usable
    texts = greedy_texts(lm, [one.input_ids[: one.prompt_length] for one in encoded], max_new_tokens=16, batch_size=64)
    hits: dict[str, list[bool]] = {task.name: [] for task in TASKS}
    for sample, text in zip(samples, texts, strict=True):
        hits[sample.category].append(text == sample.output)
    return {name: sum(found) / max(1, len(found)) for name, found in hits.items()}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder with the weights rounded to float16."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    bytes_used = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {model.num_parameters():,} parameters, {bytes_used:,} bytes")


def main(
    out: Annotated[Path, typer.Option(help="folder to write")] = MODEL_FOLDER,
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 3000,
    batch_size: Annotated[int, typer.Option(help="rows a step")] = 96,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 3e-3,
) -> None:
    """Train the embedded model and write it."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, steps, batch_size, lr)
    save(model, tokenizer, out)
    lm = LanguageModel(model.float().eval(), tokenizer, torch.device("cpu"), (), str(out))
    scores = exact_matches(lm, count=2000)
    print("exact answers: " + ", ".join(f"{name} {score:.2f}" for name, score in scores.items()))


if __name__ == "__main__":
    typer.run(main)
