"""Where the answers of held-out samples come from, and what the model reads of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.choices import check_choices, column_of, listed
from fedtune.config import RunConfig
from fedtune.data.choices import Question, Questions, questions_of
from fedtune.data.federated import FederatedData, load_federated
from fedtune.data.samples import Sample, load_samples
from fedtune.data.templates import answer_only, renderer
from fedtune.errors import ConfigError, DataError
from fedtune.models import LanguageModel

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def config(choices: str, **changes: Any) -> RunConfig:
    return RunConfig(choices=choices, template="plain", **changes)


def asked(lm: LanguageModel, samples: Sequence[Sample], choices: str, **changes: Any) -> Questions:
    return questions_of(samples, samples, "rows.jsonl", lm.tokenizer, config(choices, **changes))


def texts(lm: LanguageModel, question: Question | None) -> list[str]:
    """What stands for each answer after the prompt."""
    assert question is not None
    return [str(lm.tokenizer.decode(one.input_ids[one.prompt_length :])) for one in question.answers]


@pytest.mark.parametrize("text", ["yes", "|", "yes| ", "yes|yes", "column:", "column: "])
def test_one_answer_is_no_choice(text: str) -> None:
    with pytest.raises(ConfigError, match=r"choices = .* is one answer at most: give two or more with \| between them"):
        RunConfig(choices=text)


def test_a_setting_names_answers_a_column_or_nothing() -> None:
    for text in ("", "auto", "column:options", "yes | no"):
        check_choices(text)
    assert (column_of("column: options"), column_of("yes|no"), column_of("auto")) == ("options", "", "")
    assert listed(" yes|no || yes|perhaps not ") == ("yes", "no", "perhaps not")


def test_given_answers_stand_where_the_response_stands_without_its_end(tiny_lm: LanguageModel) -> None:
    samples = [Sample("Good?", "", "no", ""), Sample("Colour?", "", "red", ""), Sample("Bad?", "", " yes\n", "")]
    found = asked(tiny_lm, samples, "yes|no")
    first, other, last = found.each
    assert other is None
    assert (texts(tiny_lm, first), texts(tiny_lm, last)) == (["yes", "no"], [" yes", " no"])
    assert first is not None
    assert last is not None
    assert (first.right, last.right) == (1, 0)
    assert tiny_lm.tokenizer.decode(first.answers[0].input_ids[: first.answers[0].prompt_length]) == "<s>Good?\n"
    assert found.note == (
        "accuracy: 2 of 3 held-out samples are questions with 2 answers; the most frequent answer of each category would have "
        "0.5000."
    )


def test_the_answers_of_a_category_are_its_responses_where_they_are_few(tiny_lm: LanguageModel) -> None:
    classes = [Sample("q", str(n), ("good", "bad", "bad")[n % 3], "mood") for n in range(12)]
    two = [Sample("q", str(n), f"{n % 2}", "bit") for n in range(10)]
    names = [Sample("q", str(n), f"name {n % 12}", "name") for n in range(48)]
    alike = [Sample("q", str(n), "always", "same") for n in range(12)]
    found = asked(tiny_lm, [*classes, *two, *names, *alike], "auto")
    kinds = [texts(tiny_lm, one) if one else [] for one in found.each]
    assert kinds == [["bad", "good"]] * 12 + [["0", "1"]] * 10 + [[]] * 60
    assert f"{(8 + 5) / 22:.4f}." in found.note
    assert asked(tiny_lm, names, "auto").note.startswith("choices = auto: no category of the held-out rows has 2 to 20")
    assert asked(tiny_lm, [replace(one, instruction="q" * 9) for one in two], "auto", max_length=8).note.startswith(
        "choices = auto: no held-out prompt has room"
    )


def test_a_small_held_out_set_has_the_answers_of_its_whole_file(tiny_lm: LanguageModel) -> None:
    file = [Sample("q", str(n), "abc"[n % 3], "") for n in range(30)]
    found = questions_of(file[:1], file, "rows.jsonl", tiny_lm.tokenizer, config("auto"))
    assert texts(tiny_lm, found.each[0]) == ["a", "b", "c"]


def test_a_column_gives_each_row_its_own_answers(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Which?", "output": "2", "options": [1, 2, " 2 ", "three"]},
        {"instruction": "Which?", "output": "left", "options": "left|right"},
        {"instruction": "Which?", "output": "up", "options": None},
        {"instruction": "Which?", "output": "up", "options": ["left", "right"]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples, _ = load_samples(str(tmp_path / "rows.json"), config("column:options"))
    assert [sample.choices for sample in samples] == [("1", "2", "three"), ("left", "right"), (), ("left", "right")]
    assert {sample.choices for sample in load_samples(str(tmp_path / "rows.json"), config(""))[0]} == {()}
    found = asked(tiny_lm, samples, "column:options")
    assert [one and (one.right, len(one.answers)) for one in found.each] == [(1, 3), (0, 2), None, None]
    assert "2 of 4 held-out samples are questions with 2 to 3 answers;" in found.note


@pytest.mark.parametrize(
    ("choices", "length", "text"),
    [
        ("column:options", 99, "no held-out row of 'rows.jsonl' has answers in this column"),
        ("yes|no", 99, "no held-out response of 'rows.jsonl' is one of its answers .*the first is 'red'"),
        ("red|green", 9, "no held-out prompt of 'rows.jsonl' has room for its answers: raise max_length"),
    ],
)
def test_answers_that_no_sample_has_are_refused(tiny_lm: LanguageModel, choices: str, length: int, text: str) -> None:
    with pytest.raises(DataError, match=text):
        asked(tiny_lm, [Sample("Colour?", "", "red", "")], choices, max_length=length)


def test_a_sample_with_an_answer_that_does_not_fit_is_left_out_and_counted(tiny_lm: LanguageModel) -> None:
    samples = [Sample("Colour?", "", "red", ""), Sample("Colour, and nothing else?", "", "red", "")]
    found = asked(tiny_lm, samples, "red|green", max_length=20)
    assert [one is not None for one in found.each] == [True, False]
    assert "1 of 2 held-out samples are questions with 2 answers (1 more have an answer that max_length cuts);" in found.note


def test_what_closes_a_turn_is_no_part_of_an_answer(tiny_lm: LanguageModel) -> None:
    tiny_lm.tokenizer.chat_template = TEMPLATE
    for template, end in (("chat", "<end>"), ("plain", "</s>"), ("alpaca", "</s>")):
        render = renderer(template, tiny_lm.tokenizer)
        for text in ("yes", "s", end, f"e{end[-1]}"):  # also answers that look like the end
            sample = Sample("Good?", "", text, "")
            bare = answer_only(render, sample)(sample)
            assert (bare.response, bare.prompt) == (text, render(sample).prompt)
            assert render(sample).response == text + end


def test_a_federation_has_the_questions_of_its_held_out_samples(tiny_lm: LanguageModel, instructions: Path) -> None:
    """Also where only some are drawn; training samples need no answers."""
    answers = "|".join(sorted({json.loads(line)["output"] for line in instructions.read_text().splitlines()}))
    settings = {"data": str(instructions), "clients": 4, "template": "plain", "max_length": 64, "eval_samples": 6}
    data: FederatedData = load_federated(RunConfig.from_mapping({**settings, "choices": answers}), tiny_lm.tokenizer)
    assert len(data.questions.each) == len(data.heldout) == 6
    for question, sample in zip(data.questions.each, data.heldout_samples, strict=True):
        assert question is not None
        assert texts(tiny_lm, question)[question.right] == sample.output
    assert data.questions.note in data.report.notes
    plain = load_federated(RunConfig.from_mapping(settings), tiny_lm.tokenizer)
    assert (plain.questions, plain.heldout, plain.clients) == (Questions(), data.heldout, data.clients)
