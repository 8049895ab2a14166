"""What models wrote to held-out prompts: the base model's answer and the tuned one's, of one run or of several."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.report.markup import Html, cut, tag
from fedtune.report.run import Answer, Run
from fedtune.report.sections import MOST_TEXT, heading

MOST_ANSWERS = 20  # of one run
MOST_SHARED, MOST_RUNS = 10, 12  # prompts of several runs, and runs whose answers stand below each
TITLE = "Responses to held-out prompts"


def answers(run: Run) -> Html:
    """What the model answered to held-out prompts, before and after."""
    if not run.answers:
        return Html("")
    first, last = run.answered
    names = ("the base model" if not first else f"after round {first}", f"after round {last}" if last is not None else "")
    shown = []
    for number in spread(len(run.answers), MOST_ANSWERS):
        answer = run.answers[number]
        pair = [_said(name, text, answer) for name, text in zip(names, (answer.before, answer.after), strict=True) if name]
        shown.append(_shown(number, answer, pair))
    return heading(TITLE, tag("div", *shown, class_="answers"), _more(len(run.answers) - len(shown)))


def answers_compared(runs: Sequence[Run], names: Sequence[str]) -> Html:
    """The same prompts and what each run's tuned model answered; nothing where the runs were not asked the same."""
    told = [(name, run) for name, run in zip(names, runs, strict=True) if any(one.after is not None for one in run.answers)]
    asked = [[(one.prompt, one.expected) for one in run.answers] for _, run in told]
    if len(told) < 2 or any(other != asked[0] for other in asked) or not all(prompt for prompt, _ in asked[0]):
        return Html("")
    shown = []
    for number in spread(len(asked[0]), MOST_SHARED):
        first = told[0][1].answers[number]
        same = all(run.answers[number].before == first.before for _, run in told)
        base = [_said("the base model", first.before, first)] if same else []
        tuned = [_said(name, run.answers[number].after, first) for name, run in told[:MOST_RUNS]]
        shown.append(_shown(number, first, [*base, *tuned]))
    left_out = f"The answers of {len(told) - MOST_RUNS} more runs are in their folders." if len(told) > MOST_RUNS else ""
    note = tag("p", left_out, class_="quiet") if left_out else None
    return heading(TITLE, tag("div", *shown, class_="answers"), _more(len(asked[0]) - len(shown)), note)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, at even distances, the first among them."""
    return list(range(count)) if count <= most else [number * count // most for number in range(most)]


def _shown(number: int, answer: Answer, said: Sequence[Html]) -> Html:
    """One held-out sample: what was asked, what was said, and what was expected."""
    title = f"held-out sample {number + 1}" + (f", {cut(answer.category, 80)}" if answer.category else "")
    asked = _text(title, answer.prompt) if answer.prompt else tag("h3", title)
    expected = _text("expected", answer.expected) if answer.expected else None
    return tag("div", asked, tag("div", *said, expected, class_="pair"), class_="answer")


def _said(name: str, text: str | None, answer: Answer) -> Html:
    """A response under the name of who gave it, marked where it is the expected one."""
    right = text is not None and bool(answer.expected) and text.strip() == answer.expected.strip()
    return _text(f"{name} \u2713" if right else name, text)


def _text(name: str, text: str | None) -> Html:
    words = "-" if text is None else cut(text, MOST_TEXT) or "(empty)"
    return tag("div", tag("p", name, class_="name"), tag("p", words, class_="reply", dir="auto"))


def _more(left_out: int) -> Html | None:
    return tag("p", f"... and {left_out} more in the run folder.", class_="quiet") if left_out > 0 else None
