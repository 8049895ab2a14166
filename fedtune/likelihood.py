"""How likely a model finds held-out responses, and each answer of a question, from as few passes as possible.

An answer's tokens are predicted after what the model has read before them. Where another sequence of the same sample begins
with all of that, its pass gives them too: answers of one token, as in most classification, need no pass beside that of the
response itself, and its right answer never does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from fedtune.data.batches import collate
from fedtune.data.choices import Question
from fedtune.data.encode import Encoded
from fedtune.logits import Asked, token_losses
from fedtune.models import LanguageModel
from fedtune.progress import EvaluationStep, check_stop, emit


@dataclass(frozen=True)
class Likelihoods:
    """Of each held-out sample: the sum of its response tokens' losses, and the scores of its answers (() for no question).

    A loss is -log p of a token in nats, computed in float32 and added in float64; the score of an answer is the mean of log p
    over its tokens. NaN where one token has no finite loss.
    """

    sums: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class _Pass:
    """One sequence that the model reads, and what is read off it besides its own response: (sample, answer) numbers."""

    sequence: Encoded
    answers: tuple[tuple[int, int], ...]


def likelihoods(
    lm: LanguageModel, heldout: Sequence[Encoded], questions: Sequence[Question | None], batch_size: int
) -> Likelihoods:
    """The likelihoods of all samples; what the questions ask changes nothing in the sums.

    Args:
        questions: one for each sample, or () for none.

    Raises:
        Interrupted: a stop was requested; checked between batches.
    """
    own, further = _passes(heldout, questions or (None,) * len(heldout))
    passes = len(own) + len(further)
    sums = [0.0] * len(heldout)
    found: dict[tuple[int, int], float] = {}
    done = 0
    emit(EvaluationStep("loss", done, len(heldout)))
    for chosen in _batches(own, batch_size):
        check_stop()
        losses = _losses(lm, [own[number] for number in chosen], questions)
        for number, (loss, scores) in zip(chosen, losses, strict=True):
            sums[number] = loss
            found |= scores
        done += len(chosen)
        emit(EvaluationStep("loss", done * len(heldout) // passes, len(heldout)))
    for chosen in _batches(further, batch_size):
        check_stop()
        for _, scores in _losses(lm, [further[number] for number in chosen], questions):
            found |= scores
        done += len(chosen)
        emit(EvaluationStep("loss", done * len(heldout) // passes, len(heldout)))
    counts = [len(one.answers) if one else 0 for one in questions] or [0] * len(heldout)
    each = [tuple(found[sample, answer] for answer in range(count)) for sample, count in enumerate(counts)]
    return Likelihoods(tuple(sums), tuple(each))


def total(values: Sequence[float]) -> float:
    """The sum, the same in any order; NaN if any value is not finite (infinities of both signs included)."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


# ---------------------------------------------------------------------- which sequences are read


def _passes(heldout: Sequence[Encoded], questions: Sequence[Question | None]) -> tuple[list[_Pass], list[_Pass]]:
    """A pass for each sample, with the answers that it gives too, and the further ones for answers that none of them gives."""
    own, further = [], []
    for sample, (response, question) in enumerate(zip(heldout, questions, strict=True)):
        answers = question.answers if question else ()
        beside = tuple((sample, number) for number, answer in enumerate(answers) if _gives(response, answer))
        own.append(_Pass(response, beside))
        left = {number for number in range(len(answers)) if (sample, number) not in beside}
        for longest in sorted(left, key=lambda number: (-len(answers[number].input_ids), number)):
            if longest in left:
                with_it = [number for number in sorted(left) if _gives(answers[longest], answers[number])]
                left -= set(with_it)
                read = answers[longest].input_ids
                further.append(_Pass(Encoded(read, len(read), sample), tuple((sample, number) for number in with_it)))
    return own, further


def _gives(read: Encoded, answer: Encoded) -> bool:
    """Whether the pass of `read` predicts every token of `answer`: it begins with all but the last of them."""
    before = len(answer.input_ids) - 1
    return len(read.input_ids) > before and read.input_ids[:before] == answer.input_ids[:before]


def _batches(passes: Sequence[_Pass], size: int) -> Iterator[list[int]]:
    """Their numbers by length, so many at a time."""
    order = sorted(range(len(passes)), key=lambda number: (len(passes[number].sequence.input_ids), number))
    return (order[start : start + size] for start in range(0, len(order), size))


# ---------------------------------------------------------------------- what the model says


def _losses(
    lm: LanguageModel, passes: Sequence[_Pass], questions: Sequence[Question | None]
) -> list[tuple[float, dict[tuple[int, int], float]]]:
    """Of each pass: the sum of its response tokens' losses (0 for a pass of answers alone), and the scores of its answers."""
    batch = collate([one.sequence for one in passes], lm.tokenizer.pad_token_id).to(lm.device)
    answers = [(row, pair, _answer(questions, pair)) for row, one in enumerate(passes) for pair in one.answers]
    losses = token_losses(lm.model, batch, _asked([(row, answer) for row, _, answer in answers], lm.device)).tolist()
    lengths = [_tokens(one.sequence) for one in passes] + [_tokens(answer) for _, _, answer in answers]
    parts = [losses[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]
    found: list[tuple[float, dict[tuple[int, int], float]]] = [(total(part), {}) for part in parts[: len(passes)]]
    for (row, pair, _), part in zip(answers, parts[len(passes) :], strict=True):
        found[row][1][pair] = -total(part) / len(part)
    return found


def _answer(questions: Sequence[Question | None], pair: tuple[int, int]) -> Encoded:
    question = questions[pair[0]]
    assert question is not None
    return question.answers[pair[1]]


def _asked(answers: Sequence[tuple[int, Encoded]], device: torch.device) -> Asked | None:
    """The tokens of the answers, each with the row that predicts it; None if there is none."""
    places = [
        (row, position - 1, answer.input_ids[position])
        for row, answer in answers
        for position in range(_first(answer), len(answer.input_ids))
    ]
    return Asked(*torch.tensor(places, device=device).T) if places else None


def _first(sample: Encoded) -> int:
    """The first position of its response that something stands before."""
    return max(sample.prompt_length, 1)


def _tokens(sample: Encoded) -> int:
    return len(sample.input_ids) - _first(sample)
