"""Bytes to a loss and the best model for a budget, from rows made by hand whose answers are plain."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedtune.cli.compare_tables import NOT_REACHED, as_json, budget_sheet, results_sheet, target_sheet
from fedtune.errors import ConfigError
from fedtune.experiments.compare import Result
from fedtune.experiments.targets import Spread, bytes_of, to_target, with_budget
from fedtune.report.table import Row, read

ROOT = Path(__file__).parents[2]

LOSSES: dict[str, list[list[float | None]]] = {  # by arm, seed and round
    "small": [[4.0, 3.5, 3.1, 3.0], [4.0, 3.8, 3.4, 3.2]],
    "large": [[4.0, 2.5, 2.0, 2.6], [4.0, None, 2.1, 2.2]],
    "stuck": [[4.0, 4.1, 4.2, 4.0], [4.0, 3.9, math.nan, None]],
    "alone": [[4.0, 3.3, 3.2, 3.1], [4.0, 3.6, 3.3, 3.0]],
}
UP = {"small": 10, "large": 10_000, "stuck": 10, "alone": 0}  # of each round; down is twice as much


def rows() -> list[Row]:
    return [
        Row(
            "p", label, label, seed, number, eval_loss=loss, accuracy=None if label == "stuck" else 0.5 + 0.1 * number,
            bytes_up=UP[label] * (number > 0), bytes_down=2 * UP[label] * (number > 0), cumulative_bytes=3 * UP[label] * number,
        )
        for label, seeds in LOSSES.items()
        for seed, losses in enumerate(seeds)
        for number, loss in enumerate(losses)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("700", 700), ("10MB", 10_000_000), ("100 kB", 100_000), ("1.5GB", 1_500_000_000), ("2KiB", 2048), ("3b", 3),
     (" 1 MiB ", 1 << 20), ("2TB", 2 * 10**12), ("0.5", 0)],
)  # fmt: skip
def test_bytes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e6", "10 XB", "1,000", "inf", "10 MB up", "٣", "1" * 19])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no number of bytes: write 10MB, 100kB, 2GiB or 5000"):
        bytes_of(text)


def test_a_target_is_reached_at_the_first_evaluation_at_or_below_it() -> None:
    small, large, stuck, alone = to_target(rows(), 3.1)
    assert (small.label, small.seeds, small.reached) == ("small", 2, 1)  # 3.1 after round 2, the other seed never
    assert (small.rounds, small.up, small.down) == (Spread(2, 0), Spread(20, 0), Spread(40, 0))
    assert large.reached == 2
    assert large.rounds == Spread(1.5, pytest.approx(math.sqrt(0.5)))  # the second was not evaluated after round 1
    assert large.up == Spread(15_000, pytest.approx(10_000 * math.sqrt(0.5)))
    assert large.down == Spread(30_000, pytest.approx(20_000 * math.sqrt(0.5)))
    assert (stuck.reached, stuck.rounds, stuck.up, stuck.down) == (0, None, None, None)
    assert (alone.reached, alone.rounds, alone.up) == (2, Spread(3, 0), Spread(0, 0))
    assert {(one.reached, one.rounds, one.up) for one in to_target(rows(), 4.0)} == {(2, Spread(0, 0), Spread(0, 0))}


def test_a_budget_buys_the_best_model_up_to_it() -> None:
    small, large, stuck, alone = with_budget(rows(), 60)
    assert (small.loss, small.rounds, small.sent) == (
        Spread(3.25, pytest.approx(0.3 * math.sqrt(0.5))),
        Spread(2, 0),
        Spread(60, 0),
    )
    assert (large.loss, large.rounds, large.sent) == (Spread(4, 0), Spread(0, 0), Spread(0, 0))  # one round was too dear
    assert stuck.loss == Spread(3.95, pytest.approx(0.1 * math.sqrt(0.5)))  # the best was before it got worse
    assert (alone.loss, alone.sent) == (Spread(3.05, pytest.approx(0.1 * math.sqrt(0.5))), Spread(0, 0))
    assert small.accuracy == Spread(pytest.approx(0.7), 0)  # of the model with that loss
    assert (stuck.accuracy, small.rouge_l) == (None, None)
    (_, large, *_) = with_budget(rows(), 90_000)
    assert large.loss == Spread(2.05, pytest.approx(0.1 * math.sqrt(0.5)))
    assert (large.rounds, large.sent) == (Spread(2, 0), Spread(60_000, 0))
    assert with_budget(rows(), 59)[0].sent == Spread(30, 0)


def test_a_mean_over_seeds_needs_all_of_them() -> None:
    assert Spread.of([1.0, 3.0]) == Spread(2.0, pytest.approx(math.sqrt(2)))
    assert Spread.of([1.0]) == Spread(1.0, 0.0)
    assert Spread.of([]) is None
    assert Spread.of([1.0, math.nan]) is None


def test_tables_say_what_was_not_reached_and_hide_what_nobody_measured() -> None:
    sheet = target_sheet(to_target(rows(), 3.1))
    assert sheet.title == "To a held-out loss of 3.1"
    assert sheet.lines[0] == ["small", "1 of 2", "2.0", "0.0", "20 B", "0 B", "40 B", "0 B", "60 B"]
    assert sheet.lines[2] == ["stuck", NOT_REACHED, *["-"] * 7]
    assert {len(line) for line in sheet.lines} == {len(sheet.heads) + 1}
    sheet = budget_sheet(with_budget(rows(), 60))
    assert (sheet.title, sheet.heads) == ("With 60 B", ["held-out\nloss", "±", "accuracy", "±", "round", "sent"])
    assert sheet.lines[0] == ["small", "3.2500", "0.2121", "0.7000", "0.0000", "2.0", "60 B"]
    assert sheet.lines[2] == ["stuck", "3.9500", "0.0707", "-", "-", "0.5", "15 B"]
    title, gap, heads, rule, *_ = sheet.as_markdown().splitlines()
    assert (title, gap) == ("**With 60 B**", "")
    assert heads == "|  | held-out loss | ± | accuracy | ± | round | sent |"
    assert rule == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    plain, scored = (
        Result("a|b", 1, 3.0, 0.0, 1, 2, 3, 4.0, 5),
        Result("c", 1, math.nan, 0.0, 1, 2, 3, 4.0, 5, Spread(0.5, 0.1)),
    )
    assert "accuracy" not in results_sheet([plain]).heads
    assert results_sheet([plain, scored]).lines[1][4:6] == ["0.5000", "0.1000"]
    assert results_sheet([plain, scored]).lines[0][4:6] == ["-", "-"]
    assert r"| a\|b |" in results_sheet([plain]).as_markdown()


def test_json_has_the_targets_and_budgets_of_each_arm() -> None:
    found = [Result("large", 2, math.nan, 0.0, 1, 2, 3, 4.0, 5), Result("stuck", 2, 4.0, 0.0, 1, 2, 3, 4.0, 5)]
    large, stuck = json.loads(json.dumps(as_json(found, to_target(rows(), 3.1), with_budget(rows(), 60)), allow_nan=False))
    assert large["loss"] is None
    assert (large["targets"][0]["loss"], large["targets"][0]["reached"], large["targets"][0]["rounds"]["mean"]) == (3.1, 2, 1.5)
    assert (stuck["targets"][0]["reached"], stuck["targets"][0]["up"], stuck["budgets"][0]["budget"]) == (0, None, 60)
    assert stuck["budgets"][0]["loss"]["mean"] == 3.95


def test_the_tables_of_the_document_are_those_of_the_committed_rows() -> None:
    document = (ROOT / "docs" / "comparisons.md").read_text(encoding="utf-8")
    committed = read(ROOT / "simulations" / "results" / "embedded.csv")
    assert target_sheet(to_target(committed, 0.2)).as_markdown() in document
    assert budget_sheet(with_budget(committed, 1_000_000)).as_markdown() in document
