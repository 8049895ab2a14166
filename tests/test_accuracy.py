"""Accuracy by likelihood against a slow loop over whole logits in float64, and categories against the samples one by one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedtune import likelihood, logits
from fedtune.data.choices import Question
from fedtune.data.encode import Encoded
from fedtune.evaluation import LONGEST_CATEGORY, MOST_CATEGORIES, Scores, evaluate
from fedtune.likelihood import likelihoods
from fedtune.models import LanguageModel
from fedtune.progress import EvaluationStep, Event, listening
from fedtune.seeds import Stream
from tests.test_evaluation import ARCHITECTURES

VOCABULARY = 61


@pytest.fixture(params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest, tiny_lm: LanguageModel) -> LanguageModel:
    settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **ARCHITECTURES[request.param]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # likelihoods that are far apart
    return dataclasses.replace(tiny_lm, model=model)


def asked(count: int, seed: int = 0) -> tuple[list[Encoded], list[Question | None]]:
    """Samples with 2 to 5 answers of 1 to 4 tokens, some of which share their beginnings; every fifth is no question."""
    stream = Stream(seed, "questions")
    samples: list[Encoded] = []
    questions: list[Question | None] = []
    for number in range(count):
        length = 1 + int(stream.below(20, 1)[0])
        prompt = tuple(int(token) for token in stream.below(VOCABULARY - 3, length) + 3)
        start = tuple(int(token) for token in stream.below(VOCABULARY - 3, 2) + 3)
        several = 2 + int(stream.below(4, 1)[0])
        endings = [tuple(int(t) for t in stream.below(VOCABULARY - 3, 1 + n % 2) + 3) for n in range(several)]
        answers = list(dict.fromkeys((start[: n % 3] + ending) for n, ending in enumerate(endings)))
        right = int(stream.below(len(answers), 1)[0])
        encoded = tuple(Encoded(prompt + answer, length, number) for answer in answers)
        samples.append(Encoded((*encoded[right].input_ids, 2), length, number))
        questions.append(Question(encoded, right) if number % 5 else None)
    return samples, questions


@torch.no_grad()
def slowly(model: Any, answer: Encoded) -> float:
    """The oracle: mean log p of the answer's tokens, from all logits of one sequence in float64."""
    ids = torch.tensor([answer.input_ids])
    log_p = model.double()(ids).logits[0].log_softmax(-1)
    model.float()
    start = max(answer.prompt_length, 1)
    return sum(float(log_p[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])) / (ids.shape[1] - start)


def shares(scores: Sequence[Sequence[float]], questions: Sequence[Question | None]) -> float:
    pairs = [(of, question) for of, question in zip(scores, questions, strict=True) if question]
    return sum(of.index(max(of)) == question.right for of, question in pairs) / len(pairs)


@pytest.mark.parametrize("whole", [True, False], ids=["head in pieces", "row by row"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_a_slow_loop_over_whole_logits(
    lm: LanguageModel, whole: bool, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "PIECE", 3 * VOCABULARY)
    if not whole:
        monkeypatch.setattr(logits._Head, "of", classmethod(lambda *_: None))
    samples, questions = asked(16)
    expected = [tuple(slowly(lm.model, one) for one in question.answers) if question else () for question in questions]
    found = likelihoods(lm, samples, questions, batch_size)
    assert [len(of) for of in found.scores] == [len(of) for of in expected]
    for scores, slow in zip(found.scores, expected, strict=True):
        assert scores == pytest.approx(slow, abs=1e-4)
    result = evaluate(lm, samples, batch_size, questions=questions)
    assert (result.accuracy, result.questions) == (shares(expected, questions), sum(one is not None for one in questions))
    assert 0.0 < shares(expected, questions) < 1.0


def test_what_the_questions_ask_changes_nothing_in_the_loss(lm: LanguageModel) -> None:
    samples, questions = asked(12)
    alone, both = evaluate(lm, samples, 5), evaluate(lm, samples, 5, questions=questions)
    assert dataclasses.replace(both, accuracy=None, questions=0) == alone
    assert alone.accuracy is None


def test_answers_of_one_token_need_no_pass_of_their_own(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the right answer never does; others need one for each beginning that nothing else has."""
    read: list[int] = []
    real = likelihood.token_losses

    def counting(model: Any, batch: Any, more: Any = None) -> Any:
        read.append(len(batch.input_ids))
        return real(model, batch, more)

    monkeypatch.setattr(likelihood, "token_losses", counting)
    prompt = (5, 6, 7)
    single = tuple(Encoded((*prompt, token), 3, 0) for token in (10, 11, 12))
    evaluate(lm, [Encoded((*prompt, 11, 2), 3, 0)], 4, questions=[Question(single, 1)])
    assert read == [1]
    read.clear()
    longer = tuple(Encoded((*prompt, *tail), 3, 0) for tail in ((10, 4), (11, 4, 9), (11, 4), (11, 5, 8), (11, 5, 7)))
    evaluate(lm, [Encoded((*prompt, 10, 4, 2), 3, 0)], 4, questions=[Question(longer, 0)])
    assert read == [1, 2]  # (11, 4, 9) gives (11, 4) as well, and (11, 5, 8) gives (11, 5, 7)


def test_the_length_of_an_answer_is_no_advantage(lm: LanguageModel) -> None:
    """The mean over tokens decides, as in MeZO's code, and not the sum, which prefers the short."""
    samples, questions = asked(40, seed=3)
    found = likelihoods(lm, samples, questions, 8)
    by_sum = [
        tuple(score * (len(one.input_ids) - one.prompt_length) for score, one in zip(of, question.answers, strict=True))
        if question
        else ()
        for of, question in zip(found.scores, questions, strict=True)
    ]
    assert evaluate(lm, samples, 8, questions=questions).accuracy == shares(found.scores, questions)
    assert shares(found.scores, questions) != shares(by_sum, questions)


def test_answers_that_are_equally_likely_share_the_point(lm: LanguageModel) -> None:
    """Whichever of them is right, and stands first: logits in 16 bits are often equal."""
    one, other = (Encoded((5, 6, token), 2, 0) for token in (9, 10))
    more, less = sorted((one, other), key=lambda answer: -slowly(lm.model, answer))
    for answers, right, accuracy in (
        ((more, more), 0, 0.5), ((more, more), 1, 0.5), ((less, more, more), 2, 0.5), ((less, more, less), 1, 1.0),
        ((less, more, less), 0, 0.0), ((one,) * 4, 3, 0.25),
    ):  # fmt: skip
        assert evaluate(lm, [one], 1, questions=[Question(answers, right)]).accuracy == accuracy


def test_a_diverged_model_has_no_accuracy(lm: LanguageModel) -> None:
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[33] = math.nan
        lm.model.config.tie_word_embeddings = False
    samples, questions = asked(6)
    answers = tuple(Encoded((33, token), 1, 6) for token in (4, 5))
    result = evaluate(lm, [*samples, Encoded((33, 4, 2), 1, 6)], 4, questions=[*questions, Question(answers, 0)])
    assert result.accuracy is not None
    assert math.isnan(result.accuracy)


def test_categories_are_the_evaluations_of_their_samples(lm: LanguageModel) -> None:
    samples, questions = asked(17)
    categories = [("a", "b", "", "c")[number * number % 4] for number in range(17)]
    found = evaluate(lm, samples, 4, categories=categories, questions=questions)
    assert list(found.categories) == sorted(set(categories))
    for name, scores in found.categories.items():
        own = [number for number, category in enumerate(categories) if category == name]
        alone = evaluate(lm, [samples[n] for n in own], 4, questions=[questions[n] for n in own])
        assert scores == Scores(len(own), pytest.approx(alone.loss, abs=1e-6), pytest.approx(alone.accuracy))
    weights = [sum(samples[n].response_length for n, c in enumerate(categories) if c == name) for name in found.categories]
    losses = [scores.loss for scores in found.categories.values()]
    whole = sum(map(math.prod, zip(weights, losses, strict=True))) / sum(weights)
    assert whole == pytest.approx(found.loss, rel=1e-9)


def test_one_category_is_not_said_twice_and_many_are_bounded(lm: LanguageModel) -> None:
    samples, _ = asked(5)
    assert evaluate(lm, samples, 4, categories=["a"] * 5).categories == {}
    assert evaluate(lm, samples, 4).categories == {}
    long = "x" * (LONGEST_CATEGORY + 50)
    assert list(evaluate(lm, samples, 4, categories=[long, long + "y", "b", "b", "b"]).categories) == [
        "b",
        "x" * LONGEST_CATEGORY,
    ]
    many = [*itertools.islice(itertools.cycle(samples), MOST_CATEGORIES + 3)]
    names = [f"{number:04}" for number in range(MOST_CATEGORIES + 1)]
    found = evaluate(lm, many, 64, categories=[*names, names[-1], names[-1]]).categories
    assert list(found) == [*names[: MOST_CATEGORIES - 1], names[-1]]
    assert found[names[-1]].samples == 3


def test_progress_counts_samples_and_ends_with_all_of_them(lm: LanguageModel) -> None:
    samples, questions = asked(10)
    seen: list[Event] = []
    with listening(seen.append):
        evaluate(lm, samples, 4, questions=questions)
    done = [event.done for event in seen if isinstance(event, EvaluationStep)]
    assert done == sorted(done)
    assert done[0] == 0
    assert (done[-1], {event.total for event in seen if isinstance(event, EvaluationStep)}) == (10, {10})
