"""Natural Instructions v2.8 from a clone of its repository, sampled as in the official codes of FedKSeed and Ferret.

A task is a file `tasks/NAME.json` with `Definition` (a list; the first is the instruction) and `Instances`, each with
`input` and `output` (a list of references; the first is the response). `splits/default/train_tasks.txt` and
`test_tasks.txt` name the tasks. Training: `share` of each train task (0.2), tasks with fewer than 20 usable instances
left out. Evaluation: of each test task 2 %, at least 20, or all if there are fewer. An instance is usable if its input
is shorter than `max_characters` characters (1024; 0: any length). The category of a row is its task.

Source: `utils_data/natural_instruction_loader.py` in both official codes, which compare characters with a number of
tokens; draws are from the stream (seed, "natural-instructions", split, task), not numpy's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config import RunConfig
from fedtune.data.files import Row
from fedtune.data.sources.base import Rows, place_and_options
from fedtune.errors import DataError
from fedtune.regular import open_regular
from fedtune.seeds import Stream
from fedtune.values import as_written

FEWEST = 20
"""Usable instances below which a train task is left out; instances that a test task gives at least, if it has them."""

TEST_SHARE = 0.02
LARGEST_TASK = 1 << 28  # bytes of a file; those of v2.8 have at most 60 MB


@dataclass(frozen=True)
class _Task:
    """A task: its instruction, the usable instances, and how many were too long."""

    name: str
    definition: str
    usable: list[tuple[str, str]]
    too_long: int

    def rows(self, split: str, size: int, seed: int) -> list[Row]:
        """`size` of the usable instances, drawn from the task's own stream, in the order of the file."""
        chosen = Stream(seed, "natural-instructions", split, self.name).subset(len(self.usable), size)
        return [
            {"instruction": self.definition, "input": text, "output": answer, "category": self.name}
            for text, answer in (self.usable[index] for index in chosen)
        ]


def train_rows(place: str, config: RunConfig) -> Rows:
    """`share` of each train task; options share (0.2) and max_characters (1024). Raises DataError."""
    folder, options = place_and_options(place, {"share": 0.2, "max_characters": 1024})
    if not 0 < options["share"] <= 1:
        raise DataError(f"'{place}': option 'share' is the part of each task to take, above 0 and at most 1.")

    def size(usable: int) -> int:
        return int(usable * as_written(options["share"])) if usable >= FEWEST else 0

    return _read(folder, "train", options["max_characters"], config.seed, size)


def test_rows(place: str, config: RunConfig) -> Rows:
    """2 % of each test task, at least 20 instances; option max_characters (1024). Raises DataError."""
    folder, options = place_and_options(place, {"max_characters": 1024})

    def size(usable: int) -> int:
        return min(usable, max(FEWEST, int(TEST_SHARE * usable)))

    return _read(folder, "test", options["max_characters"], config.seed, size)


def _read(folder: Path, split: str, limit: float, seed: int, size: Callable[[int], int]) -> Rows:
    names = _task_names(folder, split)
    rows: list[Row] = []
    taken = usable = too_long = 0
    for name in names:
        task = _read_task(folder, name, limit)
        own = task.rows(split, size(len(task.usable)), seed)
        rows += own
        taken += bool(own)
        usable += len(task.usable)
        too_long += task.too_long
    return rows, (
        f"data: Natural Instructions, {split} split: {len(rows):,} of {usable:,} usable instances from {taken} of "
        f"{len(names)} tasks; {too_long:,} instances have an input of {limit:.0f} characters or more and are left out",
    )


def _task_names(folder: Path, split: str) -> list[str]:
    path = folder / "splits" / "default" / f"{split}_tasks.txt"
    try:
        with open_regular(path, LARGEST_TASK) as file:
            names = file.read().decode().split()
    except OSError:
        raise DataError(
            f"'{folder}' is no copy of Natural Instructions, since it lacks splits/default/{split}_tasks.txt: "
            "give the folder of a clone of github.com/allenai/natural-instructions, tag v2.8.",
            folder=str(folder),
        ) from None
    if not names:
        raise DataError(f"'{path}' names no task: get the file again.", folder=str(folder))
    return names


def _read_task(folder: Path, name: str, limit: float) -> _Task:
    path = folder / "tasks" / f"{name}.json"
    try:
        with open_regular(path, LARGEST_TASK) as file:
            content = json.loads(file.read())
    except OSError:
        raise DataError(f"Task '{name}' of the split has no file tasks/{name}.json in '{folder}': complete the copy.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"Task file '{path}' is not valid JSON ({error}): get it again.") from None
    try:
        pairs = [(_text(instance["input"]), _first(instance["output"])) for instance in content["Instances"]]
        definition = _first(content["Definition"])
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"Task file '{path}' is not in the form of v2.8 ({type(error).__name__}: {error}): Definition must be a list of "
            "texts, Instances a list with input and a list output."
        ) from None
    usable = [pair for pair in pairs if not limit or len(pair[0]) < limit]
    return _Task(name, definition, usable, len(pairs) - len(usable))


def _first(values: Any) -> str:
    """The first text of a list; a bare text is refused, since its first item would be a letter."""
    if not isinstance(values, list):
        raise TypeError(f"a list was expected, not {type(values).__name__}")
    return _text(values[0])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text was expected, not {type(value).__name__}")
    return value
