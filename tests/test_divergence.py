"""The rule that says when a run has diverged: exactly when, of which loss, and in which round first."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedtune.divergence import Divergence, blown_up, first_divergence


@pytest.mark.parametrize(
    ("loss", "before", "expected"),
    [
        (5.61, 2.8, True),
        (5.59, 2.8, False),
        (2.8, 2.8, False),
        (1.0, 2.8, False),
        (0.4, 0.01, False),  # forty times a loss near zero is still a good one
        (0.52, 0.01, True),
        (0.5, 0.0, False),
        (0.51, 0.0, True),
        (1.01, 0.5, True),
        (math.inf, 2.8, True),
        (math.nan, 2.8, True),
    ],
)
def test_a_loss_has_blown_up_above_twice_and_half_a_nat_more(loss: float, before: float, expected: bool) -> None:
    assert blown_up(loss, before) is expected


def rows(held: list[float | None], train: list[float | None], evaluated: bool = False) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: of round 0, which trains nothing, and the following."""
    seconds = {"evaluate": 0.1} if evaluated else {"clients": 1.0}
    both = enumerate(zip(held, train, strict=True))
    return [{"round": n, "eval_loss": e, "train_loss": t, "seconds": seconds} for n, (e, t) in both]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (rows([], []), None),
        (rows([2.8], [None]), None),
        (rows([2.8, 2.7, 2.6], [None, 3.0, 2.9]), None),
        (rows([2.8, 2.9, 43.0, 50.0], [None, 2.9, 2.9, 2.9]), Divergence(2, "eval_loss", 43.0, 2.8)),
        (rows([2.8, 2.0, 4.1], [None, 2.0, 2.0]), None),  # more than twice its lowest, and not of the base model
        (rows([2.8, None, None], [None, 3.0, 6.1]), Divergence(2, "train_loss", 6.1, 3.0)),
        (rows([2.8, 9.0, 9.0], [None, 3.0, 9.0]), Divergence(1, "eval_loss", 9.0, 2.8)),
        (rows([0.01, 0.3, 0.05], [None, 0.001, 0.2]), None),
        (rows([None, 5.0, 11.0], [None, None, None]), Divergence(2, "eval_loss", 11.0, 5.0)),
        (rows([2.8, None], [None, 3.0]), None),  # not measured
    ],
)
def test_the_first_round_that_shows_it_is_found(table: list[dict[str, Any]], expected: Divergence | None) -> None:
    assert first_divergence(table) == expected


def test_a_loss_that_was_measured_and_is_not_finite_diverges() -> None:
    found = first_divergence(rows([2.8, None], [None, 3.0], evaluated=True))
    assert found is not None
    assert (found.round, found.key, math.isnan(found.loss)) == (1, "eval_loss", True)
    assert "held-out loss after round 1 is not finite" in str(found)


def test_the_text_says_what_to_do() -> None:
    text = str(Divergence(2, "train_loss", 43.123456, 2.8))
    assert text.startswith("The training loss after round 2 is 43.12, and that of the first round was 2.8")
    assert "lower lr by a factor of 3 to 10" in text
    assert "fedtune sweep PRESET --measure" in text
