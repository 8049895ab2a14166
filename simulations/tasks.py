"""Files of tasks for the experiments on a real model: instruction induction, divided into clients, tuning and held-out rows.

    python -m simulations.tasks INDUCTION_TRAIN.jsonl INDUCTION_TEST.jsonl OUT

writes to OUT, from rows {"instruction", "input", "output", "category"} where category is the task (docs/data.md):

    sentiment_clients.jsonl    800 of the 1,000 training rows of `sentiment`, in the manner of SST-2; category is the label
    sentiment_tuning.jsonl     the other 200: learning rates are chosen on them
    sentiment_heldout.jsonl    the 100 test rows
    induction_clients.jsonl    up to 200 training rows of each task but those of the next two files
    induction_tuning.jsonl     up to 40 training rows of each of TUNING: learning rates are chosen on them
    induction_heldout.jsonl    up to 40 test rows of each of HELDOUT, tasks that no client has

Rows are taken in the order of the SHA-256 of their text, so that the files are the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedtune.data.files import read_rows
from fedtune.errors import DataError

Row = dict[str, Any]
COLUMNS = ("instruction", "input", "output", "category")

HELDOUT = ("larger_animal", "negation", "orthography_starts_with", "translation_en-es")
TUNING = ("antonyms", "second_word_letter", "translation_en-fr")
SENTIMENT, SENTIMENT_ROWS = "sentiment", 800
MOST_OF_A_TASK, MOST_HELD = 200, 40


def task_files(train: Iterable[Row], test: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each file, by its name. Raises DataError if a task is missing."""
    learned, asked = _by_task(train), _by_task(test)
    missing = sorted({*HELDOUT, SENTIMENT} - set(asked) | {*TUNING, SENTIMENT} - set(learned))
    if missing:
        raise DataError(f"These tasks have no rows: {', '.join(missing)}. Give the files of instruction induction.")
    sentiment = [_labelled(row) for row in learned[SENTIMENT]]
    others = sorted(set(learned) - {*HELDOUT, *TUNING, SENTIMENT})
    return {
        "sentiment_clients": sentiment[:SENTIMENT_ROWS],
        "sentiment_tuning": sentiment[SENTIMENT_ROWS:],
        "sentiment_heldout": [_labelled(row) for row in asked[SENTIMENT]],
        "induction_clients": [row for task in others for row in learned[task][:MOST_OF_A_TASK]],
        "induction_tuning": [row for task in TUNING for row in learned[task][:MOST_HELD]],
        "induction_heldout": [row for task in HELDOUT for row in asked[task][:MOST_HELD]],
    }


def _by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()):
        found.setdefault(row["category"], []).append(row)
    return found


def _labelled(row: Row) -> Row:
    """With the label as its category, by which a partition can be skewed."""
    return {**row, "category": row["output"]}


def read_task_rows(path: str) -> list[Row]:
    """The rows of a file. Raises DataError, also for one that lacks a text."""
    rows = [dict(row) for row in read_rows(path)]
    for number, row in enumerate(rows, 1):
        lacking = [name for name in COLUMNS if not isinstance(row.get(name), str)]
        if lacking:
            raise DataError(f"Row {number} of '{path}' has no text for {', '.join(lacking)}: rows have {', '.join(COLUMNS)}.")
    return rows


def main() -> None:
    """Write the files."""
    if len(sys.argv) != 4:
        sys.exit("Give the training file, the test file and a folder: python -m simulations.tasks TRAIN.jsonl TEST.jsonl OUT")
    out = Path(sys.argv[3])
    try:
        files = task_files(read_task_rows(sys.argv[1]), read_task_rows(sys.argv[2]))
        out.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
            print(f"{out / name}.jsonl: {len(rows):,} rows")
    except DataError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"'{out}' cannot be written: {error.strerror or error}.")


if __name__ == "__main__":
    main()
