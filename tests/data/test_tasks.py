"""The files of the experiments on a real model: no row is in two of them, and no task of the held-out ones is with a client."""

from __future__ import annotations

from collections import Counter

import pytest

from simulations.tasks import HELDOUT, MOST_HELD, MOST_OF_A_TASK, SENTIMENT, SENTIMENT_ROWS, TUNING, Row, task_files

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
    with pytest.raises(ValueError, match=TUNING[0]):
        task_files(few, rows("test", 5))
