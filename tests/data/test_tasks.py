"""The files of the experiments on a real model: no row is in two of them, and no task of the held-out ones is with a client."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedtune.errors import DataError
from simulations.tasks import HELDOUT, MOST_HELD, MOST_OF_A_TASK, SENTIMENT, SENTIMENT_ROWS, TUNING, Row, main, task_files

TASKS = (*HELDOUT, *TUNING, SENTIMENT, "sum", "rhymes")


def rows(kind: str, count: int) -> list[Row]:
    return [
        {"instruction": task, "input": f"{kind} {number}", "output": "positive" if number % 3 else "negative", "category": task}
        for task in TASKS
        for number in range(count)
    ]


def test_nobody_trains_on_what_is_measured() -> None:
    files = task_files(rows("train", 1000), rows("test", 100))
    assert {name: len(found) for name, found in files.items()} == {
        "sentiment_clients": SENTIMENT_ROWS,
        "sentiment_tuning": 1000 - SENTIMENT_ROWS,
        "sentiment_heldout": 100,
        "induction_clients": 2 * MOST_OF_A_TASK,
        "induction_tuning": len(TUNING) * MOST_HELD,
        "induction_heldout": len(HELDOUT) * MOST_HELD,
    }
    seen = Counter((row["instruction"], row["input"]) for found in files.values() for row in found)
    assert set(seen.values()) == {1}
    assert {row["category"] for row in files["induction_clients"]} == {"sum", "rhymes"}
    assert {row["category"] for row in files["sentiment_clients"]} == {"positive", "negative"}


def test_the_order_of_the_rows_does_not_matter() -> None:
    train, test = rows("train", 50), rows("test", 50)
    assert task_files(train, test) == task_files(train[::-1], test[::-1])


def test_a_missing_task_is_named() -> None:
    few = [row for row in rows("train", 5) if row["category"] != TUNING[0]]
    with pytest.raises(DataError, match=TUNING[0]):
        task_files(few, rows("test", 5))


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "There is no data file"), ('{"a": 1}\n', "Row 1 of .* has no text for instruction"), ("{\n", "line 1")],
)
def test_files_that_cannot_be_used_are_a_sentence(
    text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("sys.argv", ["tasks", str(path), str(path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=said):
        main()
    assert not (tmp_path / "out").exists()
