"""Held-out samples as questions with a few answers, for accuracy by likelihood as MeZO, DeComFL and HiSo report it.

Every answer is put in the place of the response, in the same template. Its tokens are those after the prompt, without the end
of the response, as in MeZO's code (princeton-nlp/MeZO, large_models/run.py: `one_step_pred`): the end says how sure the model
is to stop, and not which answer it gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedtune.choices import AUTO, column_of, listed
from fedtune.config import RunConfig
from fedtune.data.encode import Encoded, tokenise
from fedtune.data.samples import Sample
from fedtune.data.templates import answer_only, renderer
from fedtune.errors import DataError
from fedtune.foreign import for_screen

FEW = 20  # different responses of a category, up to which `auto` takes them for classes
EACH = 5  # times as many rows as that, at least: what everyone answers differently has no classes


@dataclass(frozen=True)
class Question:
    """A held-out sample with its answers in tokens, the prompt before each, and the number of the right one."""

    answers: tuple[Encoded, ...]
    right: int


@dataclass(frozen=True)
class Questions:
    """For each held-out sample its question, or None; `note` says for how many, and what guessing would give."""

    each: tuple[Question | None, ...] = ()
    note: str = ""


def questions_of(
    heldout: Sequence[Sample], file: Sequence[Sample], source: str, tokenizer: Any, config: RunConfig
) -> Questions:
    """The questions that `config.choices` makes of the samples `heldout`, whose file has the samples `file`.

    A sample whose response is none of its answers, or of which one answer does not fit into `max_length`, is no question.

    Raises:
        DataError: no sample is a question, although `choices` names where the answers are.
    """
    if not config.choices:
        return Questions()
    offered = _offered(heldout, file, config)
    asked = {
        number: answers
        for number, (sample, answers) in enumerate(zip(heldout, offered, strict=True))
        if sample.output.strip() in answers and len(answers) > 1
    }
    found = _encoded({number: (heldout[number], answers) for number, answers in asked.items()}, tokenizer, config)
    if not found and config.choices != AUTO:
        raise DataError(_nothing(heldout, offered, bool(asked), source, config), choices=config.choices)
    return Questions(tuple(found.get(number) for number in range(len(heldout))), _note(heldout, asked, found))


def _offered(heldout: Sequence[Sample], file: Sequence[Sample], config: RunConfig) -> list[tuple[str, ...]]:
    """The answers of each held-out sample, () for none."""
    if column_of(config.choices):
        return [sample.choices for sample in heldout]
    if config.choices != AUTO:
        return [listed(config.choices)] * len(heldout)
    classes = _classes(file)
    return [classes.get(sample.category, ()) for sample in heldout]


def _classes(file: Sequence[Sample]) -> dict[str, tuple[str, ...]]:
    """The different responses of each category that has few, in alphabetical order, so that no order of rows matters."""
    counts: dict[str, Counter[str]] = {}
    for sample in file:
        if text := sample.output.strip():
            counts.setdefault(sample.category, Counter())[text] += 1
    few = {name: found for name, found in counts.items() if 1 < len(found) <= FEW and found.total() >= EACH * len(found)}
    return {name: tuple(sorted(found)) for name, found in few.items()}


def _encoded(asked: Mapping[int, tuple[Sample, tuple[str, ...]]], tokenizer: Any, config: RunConfig) -> dict[int, Question]:
    """The questions, by the number of their sample."""
    if not asked:
        return {}
    render = answer_only(renderer(config.template, tokenizer), next(iter(asked.values()))[0])
    texts = [render(replace(sample, output=_as_in(sample, text))) for sample, answers in asked.values() for text in answers]
    tokens = iter(tokenise(texts, tokenizer))
    found = {}
    for number, (sample, answers) in asked.items():
        pairs = [next(tokens) for _ in answers]
        if all(max(len(prompt), 1) < len(whole) <= config.max_length for prompt, whole in pairs):
            encoded = tuple(Encoded(tuple(whole), len(prompt), number) for prompt, whole in pairs)
            found[number] = Question(encoded, answers.index(sample.output.strip()))
    return found


def _as_in(sample: Sample, answer: str) -> str:
    """`answer` after the white space that the sample's own response begins with."""
    return sample.output[: len(sample.output) - len(sample.output.lstrip())] + answer


def _note(heldout: Sequence[Sample], asked: Mapping[int, object], found: Mapping[int, Question]) -> str:
    if not found:
        why = f"no category of the held-out rows has 2 to {FEW} different responses and {EACH} times as many rows"
        why = "no held-out prompt has room for its answers in max_length" if asked else why
        return f"choices = {AUTO}: {why}, so accuracy is not measured."
    sizes = sorted({len(question.answers) for question in found.values()})
    range_ = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    usual = Counter((heldout[number].category, heldout[number].output.strip()) for number in found)
    most: dict[str, int] = {}
    for (category, _), count in usual.items():
        most[category] = max(most.get(category, 0), count)
    long = f" ({len(asked) - len(found)} more have an answer that max_length cuts)" if len(found) < len(asked) else ""
    return (
        f"accuracy: {len(found):,} of {len(heldout):,} held-out samples are questions with {range_} answers{long}; the most "
        f"frequent answer of each category would have {sum(most.values()) / len(found):.4f}."
    )


def _nothing(heldout: Sequence[Sample], offered: Sequence[tuple[str, ...]], fits: bool, source: str, config: RunConfig) -> str:
    choices = for_screen(config.choices, 80)
    if fits:
        return f"choices = {choices}: no held-out prompt of '{source}' has room for its answers: raise max_length."
    if not any(offered):
        return (
            f"choices = {choices}: no held-out row of '{source}' has answers in this column (a list, or texts with | between "
            "them): name another column."
        )
    example = next(number for number, answers in enumerate(offered) if answers)
    said = for_screen(heldout[example].output, 40)
    return (
        f"choices = {choices}: no held-out response of '{source}' is one of its answers (row by row; the first is '{said}'): "
        "give the answers as they stand in the data."
    )
