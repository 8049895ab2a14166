"""How good a model is: the loss of responses (training and held-out) and the quality of generated ones.

Padding is on the right and the models are causal, so no response token can see a padding token and no attention mask is
needed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from fedtune.config import RunConfig
from fedtune.data.batches import IGNORED, Batch, collate
from fedtune.data.encode import Encoded
from fedtune.data.samples import Sample
from fedtune.errors import ModelError
from fedtune.logits import response_logits, token_losses
from fedtune.models import LanguageModel, position_limit
from fedtune.progress import EvaluationStep, check_stop, emit
from fedtune.rouge import rouge_l, rouge_l_papers


def response_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The training loss: the mean over the response tokens of `batch` of -log p(token | what is before it).

    Returns:
        float32 scalar on the model's device, differentiable. NaN or infinite if the model is.
    """
    logits = response_logits(model, batch)
    return cross_entropy(logits.flatten(0, 1).float(), batch.targets, ignore_index=IGNORED)


def response_losses(model: torch.nn.Module, batch: Batch, copies: int) -> torch.Tensor:
    """float32 [copies]: `response_loss` of each of so many copies of `batch`, which run through the model as one batch.

    Copy i has the rows i B .. (i+1) B - 1; a model may treat the copies differently (see `fedtune.perturb.together`).
    """
    logits = response_logits(model, batch.repeat(copies))
    each = torch.split(logits, logits.shape[0] // copies)
    return torch.stack([cross_entropy(part.flatten(0, 1).float(), batch.targets, ignore_index=IGNORED) for part in each])


BATCH_TOKENS = 1 << 14
"""Tokens of the prompts and texts of one batch: 16 of 1,024, or more of shorter ones."""


@dataclass(frozen=True)
class Evaluation:
    """The loss on held-out responses, in nats per token.

    `loss` is the mean over all `tokens`, `perplexity` its exponential, and `loss_sample_mean` the mean over `samples` of
    each sample's mean token loss (the measure of the papers' codes). A model that has diverged is not hidden: one
    non-finite token makes all three non-finite; `lost` is the number of samples with one.
    """

    loss: float
    perplexity: float
    loss_sample_mean: float
    tokens: int
    samples: int
    lost: int = 0

    @property
    def finite(self) -> bool:
        """Whether the model is usable: every held-out loss is a finite number."""
        return math.isfinite(self.loss)

    def check_base(self, source: str, dtype: str) -> None:
        """Of a model that nobody has tuned yet, whose weights are finite: raise ModelError if its loss is not."""
        if self.finite:
            return
        narrow = " set dtype = float32 (its activations may overflow in float16)," if dtype == "float16" else ""
        raise ModelError(
            f"The held-out loss of the base model '{source}' is not finite, for {self.lost:,} of {self.samples:,} samples, so "
            f"nothing can be learned:{narrow} give another model, or correct the held-out samples (`fedtune data show`).",
            lost=self.lost,
            samples=self.samples,
        )


@torch.no_grad()
def evaluate(lm: LanguageModel, heldout: Sequence[Encoded], batch_size: int) -> Evaluation:
    """The held-out loss; the batch size changes it by rounding only (1e-6).

    Raises:
        ValueError: nothing to evaluate.
        Interrupted: a stop was requested; checked between batches.
    """
    if not heldout:
        raise ValueError("an evaluation needs at least one held-out sample")
    order = sorted(range(len(heldout)), key=lambda index: (len(heldout[index].input_ids), index))
    sums = [0.0] * len(heldout)
    for start in range(0, len(order), batch_size):
        check_stop()
        chosen = order[start : start + batch_size]
        losses = _response_sums(lm, [heldout[index] for index in chosen])
        for index, loss in zip(chosen, losses, strict=True):
            sums[index] = loss
        emit(EvaluationStep("loss", min(start + batch_size, len(order)), len(order)))
    return _evaluation(sums, [sample.response_length for sample in heldout])


def _response_sums(lm: LanguageModel, samples: Sequence[Encoded]) -> list[float]:
    """For each sample the sum of its response tokens' losses, each in float32, added in float64."""
    losses = token_losses(lm.model, collate(samples, lm.tokenizer.pad_token_id).to(lm.device)).tolist()
    counts = [len(sample.input_ids) - max(sample.prompt_length, 1) for sample in samples]
    ends = list(accumulate(counts, initial=0))
    return [_total(losses[start:end]) for start, end in pairwise(ends)]


def _evaluation(sums: Sequence[float], tokens: Sequence[int]) -> Evaluation:
    loss = _total(sums) / sum(tokens)
    mean = _total([value / count for value, count in zip(sums, tokens, strict=True)]) / len(sums)
    return Evaluation(loss, _exp(loss), mean, sum(tokens), len(sums), sum(not math.isfinite(value) for value in sums))


def _total(values: Sequence[float]) -> float:
    """The sum, the same in any order; NaN if any value is not finite (infinities of both signs included)."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else value * math.inf


@dataclass(frozen=True)
class Generation:
    """The quality of greedy responses, means over `samples`: ROUGE-L F (0 to 1) twice and the share of exact matches.

    `rouge_l` is that of the package rouge-score; `rouge_l_papers` that of FedKSeed's and Ferret's codes
    (see `fedtune.rouge`). `exact_match` compares stripped texts. `texts` are the responses in the order of the samples,
    `prompts` what was asked (instruction, and input after an empty line) and `references` what was expected.
    """

    rouge_l: float
    rouge_l_papers: float
    exact_match: float
    samples: int
    texts: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


def generate(lm: LanguageModel, heldout: Sequence[Encoded], samples: Sequence[Sample], config: RunConfig) -> Generation:
    """Greedy responses to the first `config.generate_samples` held-out prompts (0: to all of them) and their scores.

    Args:
        heldout, samples: the same samples as tokens and as texts, in the same order.

    Raises:
        ValueError: nothing to generate.
        Interrupted: a stop was requested; checked between batches.
    """
    count = min(config.generate_samples or len(heldout), len(heldout))
    if not count:
        raise ValueError("generation needs at least one held-out sample")
    prompts = [sample.input_ids[: sample.prompt_length] for sample in heldout[:count]]
    texts = greedy_texts(lm, prompts, config.max_new_tokens, config.eval_batch_size)
    pairs = [(text, sample.output) for text, sample in zip(texts, samples, strict=False)]
    return Generation(
        rouge_l=math.fsum(rouge_l(text, reference) for text, reference in pairs) / count,
        rouge_l_papers=math.fsum(rouge_l_papers(text, reference) for text, reference in pairs) / count,
        exact_match=sum(text.strip() == reference.strip() for text, reference in pairs) / count,
        samples=count,
        texts=texts,
        prompts=tuple("\n\n".join(filter(None, (sample.instruction, sample.input))) for sample in samples[:count]),
        references=tuple(sample.output for sample in samples[:count]),
    )


def greedy_texts(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, *, ends: bool = True
) -> tuple[str, ...]:
    """The most likely continuation of each prompt, token by token, up to the end-of-text token (not part of the text).

    Prompts of similar length share a batch, padded on the left. A prompt too long for `max_new_tokens` more positions
    of the model gets a batch of its own and as many tokens as fit, so batches do not shorten each other's responses.

    Args:
        ends: the end-of-text token ends a text; else each has `max_new_tokens`, which takes the longest time that it can.
    """
    positions = position_limit(lm.model.config) or sys.maxsize
    texts = [""] * len(prompts)
    done = 0
    for chosen in prompt_batches(prompts, max_new_tokens, batch_size, lm):
        check_stop()
        new_tokens = min(max_new_tokens, positions - max(len(prompts[index]) for index in chosen))
        for index, text in zip(chosen, _continue([prompts[index] for index in chosen], new_tokens, lm, ends), strict=True):
            texts[index] = text
        done += len(chosen)
        emit(EvaluationStep("generate", done, len(prompts)))
    return tuple(texts)


def prompt_batches(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, lm: LanguageModel
) -> list[list[int]]:
    """Indices of `prompts` by length in batches that have room for the tokens to come; a prompt without that room is alone.

    A batch has at most `batch_size` prompts and BATCH_TOKENS tokens in the end, since the model keeps something of each.
    """
    longest = (position_limit(lm.model.config) or sys.maxsize) - max_new_tokens
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    short = [index for index in order if len(prompts[index]) <= longest]
    batches: list[list[int]] = []
    for index in short:
        tokens = len(prompts[index]) + max_new_tokens
        full = not batches or len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * tokens > BATCH_TOKENS
        if full:
            batches.append([])
        batches[-1].append(index)
    return batches + [[index] for index in order[len(short) :]]


@torch.no_grad()
def _continue(prompts: Sequence[Sequence[int]], new_tokens: int, lm: LanguageModel, may_end: bool) -> list[str]:
    """The decoded greedy continuations of one batch of prompts."""
    width = max(map(len, prompts))
    pad = lm.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=lm.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=lm.device)
    model: Any = lm.model
    settings: Any = GenerationConfig
    own = model.generation_config
    ends = _end_ids(own.eos_token_id, lm.tokenizer.eos_token_id)
    model.generation_config = settings()  # the model's own may sample or penalise repetition
    try:
        end_ids = ends if may_end else None
        greedy = settings(do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=end_ids, use_cache=True)
        responses = model.generate(ids, attention_mask=mask, generation_config=greedy)[:, width:].tolist()
    finally:
        model.generation_config = own
    return [str(lm.tokenizer.decode(_until(response, ends), skip_special_tokens=True)) for response in responses]


def _end_ids(of_model: int | list[int] | None, of_tokenizer: int) -> list[int]:
    """Every token that ends a response: the tokenizer's, and those of the model's generation settings."""
    listed = [of_model] if isinstance(of_model, int) else of_model or []
    return sorted({*listed, of_tokenizer})


def _until(response: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first end token."""
    return response[: next((i for i, token in enumerate(response) if token in ends), len(response))]
