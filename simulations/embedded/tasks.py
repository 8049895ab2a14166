"""Generates the instruction tasks of the demo: what the embedded model is pretrained on, and the federated data.

Twenty-five small tasks (pick, copy, count, compare, add, recall a fact, read a sentence). Each question has the same
answer in two registers: terse ("cold") and a full sentence ("The opposite of hot is cold.").

What is shifted between pretraining and federation, and why. In pretraining the register follows the request: after
"Use a full sentence." the answer is a sentence; otherwise it is terse, but for a few rows in a hundred. In the federated
data every client wants full sentences and nobody says so. The base model therefore answers correctly in the wrong
register, and fine-tuning has to move a default that the model can already leave. That is the kind of change that a
few thousand zeroth-order steps can make; new facts or skills are not, and the demo claims none.

`tasks.jsonl` has twenty categories for clients, one task each, and the category "unseen": five more tasks, which
the model was pretrained on like the others but which no client has. Held out, they show whether the register carried
over to tasks that nobody trained on. Facts (capitals, opposites, ...) are finite, so pretraining has seen them;
its rows are drawn from other streams, not kept apart from these.

Run `python -m simulations.embedded.tasks` to write `tasks.jsonl` again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fedtune.data.samples import Sample
from fedtune.seeds import Stream
from simulations.embedded import words

T = TypeVar("T")

SEED = 2026
CLIENT_ROWS = 150
UNSEEN_ROWS = 40
ASKED = " Use a full sentence."
ASKED_SHARE = 0.3
UNASKED_SENTENCES = 0.03
TASKS_FILE = Path(__file__).with_name("tasks.jsonl")


class Draws:
    """Single random choices from one named stream (drawn from it a few thousand at a time, for speed)."""

    def __init__(self, *name: int | str) -> None:
        self._stream = Stream("embedded", *name)
        self._ready: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._ready:
            self._ready = self._stream.uniform(4096).tolist()[::-1]
        return self._ready.pop()

    def below(self, bound: int) -> int:
        """A whole number in 0 .. bound-1."""
        return int(self.uniform() * bound)

    def between(self, low: int, high: int) -> int:
        """A whole number in low .. high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[self.below(len(items))]

    def distinct(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different positions of `items`, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All `items` in random order."""
        return self.distinct(items, len(items))


@dataclass(frozen=True)
class Question:
    """An input with its answer in both registers."""

    input: str
    terse: str
    sentence: str


@dataclass(frozen=True)
class Task:
    """A named task: ways to ask for it, and the rule that draws a question."""

    name: str
    instructions: tuple[str, ...]
    draw: Callable[[Draws], Question]


def _first_word(d: Draws) -> Question:
    items = d.distinct(words.NOUNS, d.between(2, 4))
    return Question(" ".join(items), items[0], f"The first word is {items[0]}.")


def _second_word(d: Draws) -> Question:
    items = d.distinct(words.NOUNS, d.between(3, 4))
    return Question(" ".join(items), items[1], f"The second word is {items[1]}.")


def _last_word(d: Draws) -> Question:
    items = d.distinct(words.NOUNS, d.between(2, 4))
    return Question(" ".join(items), items[-1], f"The last word is {items[-1]}.")


def _copy(d: Draws) -> Question:
    text = " ".join(d.distinct(words.NOUNS, d.between(2, 3)))
    return Question(text, text, f"The words are {text}.")


def _reverse(d: Draws) -> Question:
    items = d.distinct(words.NOUNS, d.between(2, 3))
    text = " ".join(reversed(items))
    return Question(" ".join(items), text, f"In reverse order the words are {text}.")


def _drop_first(d: Draws) -> Question:
    items = d.distinct(words.NOUNS, d.between(2, 3))
    text = " ".join(items[1:])
    return Question(" ".join(items), text, f"Without the first word it is {text}.")


def _swap(d: Draws) -> Question:
    one, two = d.distinct(words.NOUNS, 2)
    return Question(f"{one} {two}", f"{two} {one}", f"The swapped words are {two} {one}.")


def _count(d: Draws) -> Question:
    items = d.distinct(words.NOUNS, d.between(1, 6))
    number = words.NUMBER_WORDS[len(items)]
    return Question(" ".join(items), number, f"The number of words is {number}.")


def _repeated(d: Draws) -> Question:
    items = d.distinct(words.NOUNS, d.between(2, 3))
    return Question(" ".join(d.shuffled([*items, items[0]])), items[0], f"The repeated word is {items[0]}.")


def _odd_one_out(d: Draws) -> Question:
    kind, other = d.distinct(tuple(words.KINDS), 2)
    odd = d.pick(words.KINDS[other])
    items = d.shuffled([odd, *d.distinct(words.KINDS[kind], 3)])
    return Question(" ".join(items), odd, f"The word that does not fit is {odd}.")


def _find(kind: str) -> Callable[[Draws], Question]:
    others = tuple(word for word in words.NOUNS if words.KIND_OF[word] != kind)

    def draw(d: Draws) -> Question:
        found = d.pick(words.KINDS[kind])
        items = d.shuffled([found, *d.distinct(others, d.between(1, 3))])
        return Question(" ".join(items), found, f"The {kind} in the list is {found}.")

    return draw


def _kind(d: Draws) -> Question:
    noun = d.pick(words.NOUNS)
    kind = words.KIND_OF[noun]
    return Question(noun, kind, f"The word {noun} names {words.with_article(kind)}.")


def _opposite(d: Draws) -> Question:
    pair = d.pick(words.OPPOSITES)
    one, two = d.distinct(pair, 2)
    return Question(one, two, f"The opposite of {one} is {two}.")


def _plural(d: Draws) -> Question:
    noun = d.pick(tuple(words.PLURALS))
    return Question(noun, words.PLURALS[noun], f"The plural of {noun} is {words.PLURALS[noun]}.")


def _past(d: Draws) -> Question:
    verb = d.pick(tuple(words.PAST))
    return Question(verb, words.PAST[verb], f"The past tense of {verb} is {words.PAST[verb]}.")


def _capital(d: Draws) -> Question:
    country = d.pick(tuple(words.CAPITALS))
    return Question(country, words.CAPITALS[country], f"The capital of {country} is {words.CAPITALS[country]}.")


def _sum(d: Draws) -> Question:
    a, b = d.between(1, 12), d.between(1, 12)
    return Question(f"{a} {b}", f"{a + b}", f"The sum of {a} and {b} is {a + b}.")


def _difference(d: Draws) -> Question:
    b, rest = d.between(1, 12), d.between(1, 12)
    return Question(f"{b + rest} {b}", f"{rest}", f"The difference of {b + rest} and {b} is {rest}.")


def _two_numbers(d: Draws) -> tuple[int, int]:
    a = d.between(1, 50)
    return a, (a + d.between(1, 49) - 1) % 50 + 1


def _larger(d: Draws) -> Question:
    a, b = _two_numbers(d)
    return Question(f"{a} {b}", f"{max(a, b)}", f"The larger number is {max(a, b)}.")


def _smaller(d: Draws) -> Question:
    a, b = _two_numbers(d)
    return Question(f"{a} {b}", f"{min(a, b)}", f"The smaller number is {min(a, b)}.")


def _parity(d: Draws) -> Question:
    number = d.between(1, 50)
    parity = "odd" if number % 2 else "even"
    return Question(f"{number}", parity, f"The number {number} is {parity}.")


def _scene(d: Draws) -> tuple[str, str, str, str, str]:
    """(text, person, colour, thing, place)"""
    person, colour = d.pick(words.NAMES), d.pick(words.KINDS["colour"])
    thing = d.pick(words.KINDS["garment"] + words.KINDS["vehicle"])
    place = d.pick(tuple(words.CAPITALS.values()))
    text = d.pick((f"{person} lost a {colour} {thing} in {place}.", f"In {place} {person} bought a {colour} {thing}."))
    return text, person, colour, thing, place


def _who(d: Draws) -> Question:
    text, person, *_ = _scene(d)
    return Question(text, person, f"The person is {person}.")


def _colour_of(d: Draws) -> Question:
    text, _, colour, thing, _ = _scene(d)
    return Question(text, colour, f"The colour of the {thing} is {colour}.")


def _where(d: Draws) -> Question:
    text, *_, place = _scene(d)
    return Question(text, place, f"The place is {place}.")


def _review(d: Draws) -> Question:
    good = d.below(2) == 1
    text = f"The {d.pick(words.REVIEWED)} was {d.pick(words.DEGREES)}{d.pick(words.PRAISE if good else words.BLAME)}."
    verdict = "positive" if good else "negative"
    return Question(text, verdict, f"The review is {verdict}.")


CLIENT_TASKS: tuple[Task, ...] = (
    Task("first word", ("Name the first word.", "What is the first word?", "Give the word at the start."), _first_word),
    Task("second word", ("Name the second word.", "What is the second word?", "Give the word in second place."), _second_word),
    Task("copy", ("Repeat the words.", "Copy the words.", "Say the words again."), _copy),
    Task("drop first", ("Remove the first word.", "Leave out the first word.", "Drop the word at the start."), _drop_first),
    Task("swap", ("Swap the two words.", "Exchange the words.", "Give the words in the other order."), _swap),
    Task("count", ("Count the words.", "How many words are there?", "Give the number of words."), _count),
    Task("repeated", ("Which word is repeated?", "Name the repeated word.", "Find the word given twice."), _repeated),
    Task(
        "odd one out", ("Which word does not fit?", "Find the odd one out.", "Name the word that is different."), _odd_one_out
    ),
    Task("find animal", ("Find the animal.", "Which word is an animal?", "Name the animal."), _find("animal")),
    Task("find colour", ("Find the colour.", "Which word is a colour?", "Name the colour in the list."), _find("colour")),
    Task("kind", ("What kind of thing is it?", "Name the kind.", "Give the kind of thing."), _kind),
    Task("opposite", ("Give the opposite.", "What is the opposite?", "Name the opposite of the word."), _opposite),
    Task("plural", ("Give the plural.", "What is the plural?", "Name the plural of the word."), _plural),
    Task("past tense", ("Give the past tense.", "What is the past tense?", "Put the verb in the past tense."), _past),
    Task("sum", ("Add the numbers.", "What is the sum?", "Give the sum of the numbers."), _sum),
    Task(
        "difference", ("Subtract the numbers.", "What is the difference?", "Give the difference of the numbers."), _difference
    ),
    Task("smaller", ("Which number is smaller?", "Give the smaller number.", "Name the smaller of the two."), _smaller),
    Task("parity", ("Is the number even or odd?", "Even or odd?", "Say if it is even or odd."), _parity),
    Task("who", ("Who is it about?", "Name the person.", "Which person is in the text?"), _who),
    Task("review", ("Is the review positive or negative?", "Judge the review.", "Positive or negative?"), _review),
)
UNSEEN_TASKS: tuple[Task, ...] = (
    Task("last word", ("Name the last word.", "What is the last word?", "Give the word at the end."), _last_word),
    Task("reverse", ("Reverse the words.", "Say the words backwards.", "Give the words in reverse order."), _reverse),
    Task("capital", ("Name the capital.", "What is the capital?", "Give the capital of the country."), _capital),
    Task("larger", ("Which number is larger?", "Give the larger number.", "Name the larger of the two."), _larger),
    Task("where", ("Where was it?", "Name the place.", "Which place is in the text?"), _where),
)
TASKS: tuple[Task, ...] = CLIENT_TASKS + UNSEEN_TASKS


def pretraining_samples(seed: int) -> Iterator[Sample]:
    """Endless samples of all tasks in the registers described at the top of this file; the category names the task."""
    d = Draws("pretraining", seed)
    while True:
        task = d.pick(TASKS)
        question, instruction = task.draw(d), d.pick(task.instructions)
        asked = d.uniform() < ASKED_SHARE
        sentence = asked or d.uniform() < UNASKED_SENTENCES
        output = question.sentence if sentence else question.terse
        yield Sample(instruction + (ASKED if asked else ""), question.input, output, task.name)


def federated_rows() -> list[dict[str, str]]:
    """The rows of `tasks.jsonl`: distinct questions, all answered in full sentences though none asks for it."""
    rows = [row for task in CLIENT_TASKS for row in _rows(task, task.name, CLIENT_ROWS)]
    return rows + [row for task in UNSEEN_TASKS for row in _rows(task, "unseen", UNSEEN_ROWS)]


def _rows(task: Task, category: str, count: int) -> list[dict[str, str]]:
    """`count` distinct rows of `task`, or as many as its facts allow."""
    d = Draws("federated", SEED, task.name)
    found: dict[tuple[str, str], dict[str, str]] = {}
    for _ in range(20 * count):
        question, instruction = task.draw(d), d.pick(task.instructions)
        row = {"instruction": instruction, "input": question.input, "output": question.sentence, "category": category}
        found.setdefault((instruction, question.input), row)
        if len(found) == count:
            break
    return list(found.values())


def as_jsonl(rows: Sequence[dict[str, str]]) -> str:
    """One JSON object per line, keys in the order given."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    TASKS_FILE.write_text(as_jsonl(federated_rows()), encoding="utf-8")
    print(f"{TASKS_FILE.name}: {TASKS_FILE.stat().st_size:,} bytes")
