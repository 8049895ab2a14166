"""The tables of `fedtune compare`, on the screen and in Markdown, and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from fedtune.cli.screen import quoted
from fedtune.experiments.compare import Result
from fedtune.experiments.targets import Spread, ToTarget, WithBudget
from fedtune.foreign import for_screen
from fedtune.numbers import in_bytes, in_time

CAPTION = "up, down: payload of a client and round; ±: standard deviation over seeds"
TARGET_CAPTION = (
    "rounds and payload of all clients until then, over the seeds that came there; ±: standard deviation over seeds"
)
BUDGET_CAPTION = (
    "the model with the lowest held-out loss within the budget; sent: payload of all clients up to it, both directions"
)
SCORES = (("accuracy", "accuracy"), ("ROUGE-L", "rouge_l"), ("exact\nmatch", "exact_match"))
NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Sheet:
    """A table of texts: a title, the heads of its columns (a line break where it is narrow), a line for each arm, a caption."""

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    caption: str

    def for_screen(self) -> Table:
        """As rich shows it."""
        title = quoted(self.title) if self.title else None
        view = Table(box=None, pad_edge=False, title=title, title_justify="left", caption=self.caption, caption_justify="left")
        view.add_column("")  # the one that wraps where the terminal is narrow
        for name in self.heads:
            view.add_column(quoted(name), justify="right", no_wrap=True)
        for label, *cells in self.lines:
            view.add_row(label, *cells)
        return view

    def as_markdown(self) -> str:
        """The same for a document."""
        lines = [
            ["", *(head.replace("\n", " ") for head in self.heads)],
            ["---", *("---:" for _ in self.heads)],
            *([for_screen(label).replace("|", r"\|"), *cells] for label, *cells in self.lines),
        ]
        title = f"**{self.title}**\n\n" if self.title else ""
        return title + "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.caption}\n"


def results_sheet(found: Sequence[Result]) -> Sheet:
    """The results of each arm; scores that no run has measured have no column."""
    scores = [(head, key) for head, key in SCORES if any(getattr(result, key) is not None for result in found)]
    heads = ["seeds", "held-out\nloss", "±", *(part for head, _ in scores for part in (head, "±"))]
    heads += ["up", "down", "whole\nrun", "CPU\ntime", "peak\nmemory"]
    return Sheet("", heads, [_result(result, [key for _, key in scores]) for result in found], CAPTION)


def _result(result: Result, scores: Sequence[str]) -> list[str]:
    cells = [result.label, str(result.seeds), f"{result.loss:.4f}", f"{result.spread:.4f}"]
    for key in scores:
        cells += _with_deviation(getattr(result, key), _share)
    return [
        *cells,
        in_bytes(result.up),
        in_bytes(result.down),
        in_bytes(result.total),
        in_time(result.cpu_seconds),
        in_bytes(result.memory),
    ]


def target_sheet(found: Sequence[ToTarget]) -> Sheet:
    """What each arm needed to one target."""
    lines = [[one.label, *_to_target(one)] for one in found]
    title = f"To a held-out loss of {found[0].loss:g}" if found else ""
    return Sheet(title, ["reached", "rounds", "±", "up", "±", "down", "±", "both"], lines, TARGET_CAPTION)


def _to_target(one: ToTarget) -> list[str]:
    if one.rounds is None or one.up is None or one.down is None:
        return [NOT_REACHED, *["-"] * 7]
    bytes_ = [text for way in (one.up, one.down) for text in _with_deviation(way, in_bytes)]
    rounds = _with_deviation(one.rounds, "{:.1f}".format)
    return [f"{one.reached} of {one.seeds}", *rounds, *bytes_, in_bytes(one.up.mean + one.down.mean)]


def budget_sheet(found: Sequence[WithBudget]) -> Sheet:
    """What each arm had for one budget; scores that no best model has have no column."""
    scores = [(head, key) for head, key in SCORES if any(getattr(one, key) is not None for one in found)]
    heads = ["held-out\nloss", "±", *(part for head, _ in scores for part in (head, "±")), "round", "sent"]
    title = f"With {in_bytes(found[0].budget)}" if found else ""
    return Sheet(title, heads, [_with_budget(one, [key for _, key in scores]) for one in found], BUDGET_CAPTION)


def _with_budget(one: WithBudget, scores: Sequence[str]) -> list[str]:
    cells = [one.label, *_with_deviation(one.loss, _share)]
    for key in scores:
        cells += _with_deviation(getattr(one, key), _share)
    return [*cells, f"{one.rounds.mean:.1f}" if one.rounds else "-", in_bytes(one.sent.mean) if one.sent else "-"]


def _with_deviation(spread: Spread | None, write: Callable[[float], str]) -> list[str]:
    return [write(spread.mean), write(spread.deviation)] if spread else ["-", "-"]


def _share(value: float) -> str:
    return f"{value:.4f}"


def as_json(found: Sequence[Result], targets: Sequence[ToTarget], budgets: Sequence[WithBudget]) -> list[dict[str, Any]]:
    """One object an arm, with what it needed to each target and had for each budget; its label is said once.

    JSON has no NaN: the loss of an arm that diverged is null.
    """
    return [
        {
            **asdict(one),
            "loss": one.loss if math.isfinite(one.loss) else None,
            "targets": [_without_label(asdict(target)) for target in targets if target.label == one.label],
            "budgets": [_without_label(asdict(budget)) for budget in budgets if budget.label == one.label],
        }
        for one in found
    ]


def _without_label(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "label"}
