"""When a run has diverged, and what to do then: one rule for the warning of a run, its report, and the end of a sweep's run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOWN_UP = 2.0
"""A loss so many times that of the base model has diverged ..."""
LEAST_RISE = 0.5
"""... if that is also so much more, in nats a token: a loss near zero doubles without any harm."""
ADVICE = (
    "lower lr by a factor of 3 to 10, or measure one: `fedtune sweep PRESET --measure`; a resume keeps its lr, so begin anew"
)
LOSSES = {"eval_loss": "held-out", "train_loss": "training"}


@dataclass(frozen=True)
class Divergence:
    """The first round after which a loss (`eval_loss` or `train_loss`) had blown up, and the loss that it is held against.

    `loss` is NaN where it was measured and not finite.
    """

    round: int
    key: str
    loss: float
    before: float

    def __str__(self) -> str:
        since = "of the base model" if self.key == "eval_loss" else "of the first round"
        loss = f"{self.loss:.4g}" if math.isfinite(self.loss) else "not finite"
        return (
            f"The {LOSSES[self.key]} loss after round {self.round} is {loss}, and that {since} was {self.before:.4g}: the run "
            f"diverges. Advice: {ADVICE}."
        )


def blown_up(loss: float, before: float) -> bool:
    """Whether `loss` is above BLOWN_UP times `before`, and by LEAST_RISE at least; one that is not finite is.

    >>> blown_up(5.7, 2.8), blown_up(5.5, 2.8), blown_up(0.4, 0.01), blown_up(math.nan, 2.8)
    (True, False, False, True)
    """
    return not loss <= max(BLOWN_UP * before, before + LEAST_RISE)


def first_divergence(rows: Sequence[Mapping[str, Any]]) -> Divergence | None:
    """The first round whose held-out loss has blown up against the base model's, or whose training loss against round 1's.

    Args:
        rows: of metrics.jsonl, in order (`round`, `eval_loss`, `train_loss`, `seconds`); a loss that was not measured says
            nothing.
    """
    start: dict[str, float] = {}
    for row in rows:
        for key in LOSSES:
            loss = _loss(row, key)
            if loss is not None and blown_up(loss, start.setdefault(key, loss)):
                return Divergence(row["round"], key, loss, start[key])
    return None


def _loss(row: Mapping[str, Any], key: str) -> float | None:
    """None: it was not measured. One that was and is not finite is null in the row, which has the seconds of the evaluation."""
    loss, seconds = row.get(key), row.get("seconds")
    if isinstance(loss, int | float) and not isinstance(loss, bool):
        return float(loss)
    evaluated = key == "eval_loss" and isinstance(seconds, Mapping) and "evaluate" in seconds
    return math.nan if evaluated else None
