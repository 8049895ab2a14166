"""How good a model is: the loss of responses (training and held-out), accuracy, and the quality of generated responses.

Padding is on the right and the models are causal, so no response token can see a padding token and no attention mask is
needed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from fedtune.config import RunConfig
from fedtune.data.batches import IGNORED, Batch
from fedtune.data.choices import Question
from fedtune.data.encode import Encoded
from fedtune.data.federated import FederatedData
from fedtune.data.samples import Sample
from fedtune.errors import ModelError
from fedtune.likelihood import likelihoods, total
from fedtune.logits import response_logits
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
class Scores:
    """Loss and accuracy over the held-out `samples` of one category, as in `Evaluation`."""

    samples: int
    loss: float
    accuracy: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The loss on held-out responses, in nats per token, and the accuracy on those that are questions.

    `loss` is the mean over all `tokens`, `perplexity` its exponential, and `loss_sample_mean` the mean over `samples` of
    each sample's mean token loss (the measure of the papers' codes). A model that has diverged is not hidden: one
    non-finite token makes all three non-finite; `lost` is the number of samples with one.

    `accuracy` is the share of `questions` whose right answer has the highest mean log likelihood per token (equals
    share the point); NaN if one of these likelihoods is not finite, None where there is no question. `categories` has the
    same for each category where the samples have more than one, the MOST_CATEGORIES with most samples, by name.
    """

    loss: float
    perplexity: float
    loss_sample_mean: float
    tokens: int
    samples: int
    lost: int = 0
    accuracy: float | None = None
    questions: int = 0
    categories: Mapping[str, Scores] = field(default_factory=dict)

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


MOST_CATEGORIES, LONGEST_CATEGORY = 200, 200  # that a line of metrics has; characters of a name, what follows is cut off


def evaluate_heldout(lm: LanguageModel, data: FederatedData, batch_size: int) -> Evaluation:
    """`evaluate` on the held-out samples of `data`, with their categories and questions."""
    categories = [sample.category for sample in data.heldout_samples]
    return evaluate(lm, data.heldout, batch_size, categories=categories, questions=data.questions.each)


@torch.no_grad()
def evaluate(
    lm: LanguageModel,
    heldout: Sequence[Encoded],
    batch_size: int,
    *,
    categories: Sequence[str] = (),
    questions: Sequence[Question | None] = (),
) -> Evaluation:
    """The held-out loss; the batch size changes it by rounding only (1e-6), categories and questions in nothing.

    Args:
        categories, questions: of each sample, in the order of `heldout`; () for none.

    Raises:
        ValueError: nothing to evaluate.
        Interrupted: a stop was requested; checked between batches.
    """
    if not heldout:
        raise ValueError("an evaluation needs at least one held-out sample")
    found = likelihoods(lm, heldout, questions, batch_size)
    right = [_is_right(scores, question) for scores, question in zip(found.scores, questions, strict=True)] if questions else []
    return _evaluation(found.sums, [sample.response_length for sample in heldout], right, categories)


def _is_right(scores: Sequence[float], question: Question | None) -> float | None:
    """1 if the right answer is the most likely one, else 0; answers that are equally likely share the 1, so that their order is
    no advantage (logits in 16 bits are often equal). NaN where a likelihood is not finite, None for no question.
    """
    if question is None:
        return None
    if not all(map(math.isfinite, scores)):
        return math.nan
    best = max(scores)
    return 1.0 / scores.count(best) if scores[question.right] == best else 0.0


def _evaluation(
    sums: Sequence[float], tokens: Sequence[int], right: Sequence[float | None], categories: Sequence[str]
) -> Evaluation:
    loss = total(sums) / sum(tokens)
    mean = total([value / count for value, count in zip(sums, tokens, strict=True)]) / len(sums)
    lost = sum(not math.isfinite(value) for value in sums)
    answered = [one for one in right if one is not None]
    by_name: dict[str, list[int]] = {}
    for number, category in enumerate(categories):
        by_name.setdefault(category[:LONGEST_CATEGORY], []).append(number)
    most = sorted(by_name, key=lambda name: (-len(by_name[name]), name))[:MOST_CATEGORIES] if len(by_name) > 1 else []
    scores = {name: _scores(by_name[name], sums, tokens, right) for name in sorted(most)}
    return Evaluation(loss, _exp(loss), mean, sum(tokens), len(sums), lost, _share(answered), len(answered), scores)


def _scores(numbers: Sequence[int], sums: Sequence[float], tokens: Sequence[int], right: Sequence[float | None]) -> Scores:
    answered = [one for number in numbers if right and (one := right[number]) is not None]
    loss = total([sums[number] for number in numbers]) / sum(tokens[number] for number in numbers)
    return Scores(len(numbers), loss, _share(answered))


def _share(answered: Sequence[float]) -> float | None:
    return total(answered) / len(answered) if answered else None


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else value * math.inf


@dataclass(frozen=True)
class Generation:
    """The quality of greedy responses, means over `samples`: ROUGE-L F (0 to 1) twice and the share of exact matches.

    `rouge_l` is that of the package rouge-score; `rouge_l_papers` that of FedKSeed's and Ferret's codes
    (see `fedtune.rouge`). `exact_match` compares stripped texts. `texts` are the responses in the order of the samples,
    `prompts` what was asked (instruction, and input after an empty line), `references` what was expected, and `categories`
    those of the samples.
    """

    rouge_l: float
    rouge_l_papers: float
    exact_match: float
    samples: int
    texts: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()


def generate(lm: LanguageModel, heldout: Sequence[Encoded], samples: Sequence[Sample], config: RunConfig) -> Generation:
    """Greedy responses to `config.generate_samples` held-out prompts (0: to all of them) and their scores.

    They are the first of each category, then the second of each, and so on, so that a file sorted by category gives all.

    Args:
        heldout, samples: the same samples as tokens and as texts, in the same order.

    Raises:
        ValueError: nothing to generate.
        Interrupted: a stop was requested; checked between batches.
    """
    count = min(config.generate_samples or len(heldout), len(heldout))
    if not count:
        raise ValueError("generation needs at least one held-out sample")
    chosen = in_turn([sample.category for sample in samples], count)
    samples = [samples[number] for number in chosen]
    prompts = [heldout[number].input_ids[: heldout[number].prompt_length] for number in chosen]
    texts = greedy_texts(lm, prompts, config.max_new_tokens, config.eval_batch_size)
    pairs = [(text, sample.output) for text, sample in zip(texts, samples, strict=True)]
    return Generation(
        rouge_l=math.fsum(rouge_l(text, reference) for text, reference in pairs) / count,
        rouge_l_papers=math.fsum(rouge_l_papers(text, reference) for text, reference in pairs) / count,
        exact_match=sum(text.strip() == reference.strip() for text, reference in pairs) / count,
        samples=count,
        texts=texts,
        prompts=tuple("\n\n".join(filter(None, (sample.instruction, sample.input))) for sample in samples),
        references=tuple(sample.output for sample in samples),
        categories=tuple(sample.category for sample in samples) if any(sample.category for sample in samples) else (),
    )


def in_turn(categories: Sequence[str], count: int) -> list[int]:
    """The numbers of `count` samples, ascending: the first of each category, then the second of each, and so on.

    >>> in_turn(["a", "a", "a", "b", "b"], 3), in_turn(["", "", ""], 2)
    ([0, 1, 3], [0, 1])
    """
    seen: dict[str, int] = {}
    turns = []
    for number, category in enumerate(categories):
        seen[category] = seen.get(category, 0) + 1
        turns.append((seen[category], number))
    return sorted(number for _, number in sorted(turns)[:count])


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
    emit(EvaluationStep("generate", done, len(prompts)))
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
