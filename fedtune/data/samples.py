"""From rows to samples with four plain strings.

`fedtune.data.files` and `fedtune.data.sources` give rows (mappings from column to value); columns are mapped by the
settings `instruction_column`, `input_column`, `output_column` and `category_column`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.choices import column_of, listed
from fedtune.config import RunConfig
from fedtune.data.files import Row
from fedtune.data.sources.named import read_source
from fedtune.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One instruction with its response. `input` and `category` are "" where the row has none.

    `choices` are the answers that its row names, of which the response should be one; () unless `choices` names a column.
    """

    instruction: str
    input: str
    output: str
    category: str
    choices: tuple[str, ...] = ()


def load_samples(source: str, config: RunConfig, needs_category: bool = False) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """The samples of `source` in file order (all rows, also unusable ones), and notes on what is not there.

    A column for the input or the category that is in no row is taken as empty, with a note; the category only if
    `needs_category` is false, the input only if `input_column` is not set by hand.

    Raises:
        DataError: the file is missing or malformed, has no row, or lacks a column that is needed.
    """
    rows, notes = read_source(source, config)
    if not rows:
        raise DataError(f"'{source}' has no rows: give a file with at least one sample.", source=source)
    notes += _check_columns(rows, source, config, needs_category)
    return tuple(_sample(row, config) for row in rows), notes


def _sample(row: Row, config: RunConfig) -> Sample:
    answers = column_of(config.choices)
    return Sample(
        instruction=_text(row.get(config.instruction_column)),
        input=_text(row.get(config.input_column)),
        output=_text(row.get(config.output_column)),
        category=_text(row.get(config.category_column)),
        choices=_answers(row.get(answers)) if answers else (),
    )


def _check_columns(rows: Sequence[Row], source: str, config: RunConfig, needs_category: bool) -> tuple[str, ...]:
    """Raise for a column that is needed and in no row; note any other, which is taken as empty."""
    there = sorted({column for row in rows for column in row})
    needs_input = config.input_column not in ("", RunConfig.model_fields["input_column"].default)
    notes = []
    for key, needed in (
        ("instruction_column", True),
        ("output_column", True),
        ("input_column", needs_input),
        ("category_column", needs_category),
    ):
        column = getattr(config, key)
        if column in there or (column == "" and not needed):
            continue
        if needed:
            raise DataError(
                f"'{source}' has no column '{column}' ({key}); its columns are {', '.join(there)}. Set {key} to one of them.",
                column=column,
                columns=tuple(there),
            )
        notes.append(f"data: no column '{column}' in {source}, taken as empty (columns: {', '.join(there)})")
    return tuple(notes)


def _answers(value: object) -> tuple[str, ...]:
    """The answers in a cell: the items of a list, or a text with | between them; without white space around, none twice."""
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(text for item in value if (text := _text(item).strip())))
    return listed(_text(value))


def _text(value: object) -> str:
    """The text of a cell: None is "", numbers and truth values as JSON writes them, lists and objects as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
