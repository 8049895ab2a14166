"""Reading instruction data: JSON, JSON Lines, Parquet or a data set of the hub -> samples with four plain strings.

Every reader gives a list of rows (mappings from column to value); columns are then mapped by the settings
`instruction_column`, `input_column`, `output_column` and `category_column`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config import RunConfig, expand
from fedtune.embedded import embedded_path
from fedtune.errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """One instruction with its response. `input` and `category` are "" where the row has none."""

    instruction: str
    input: str
    output: str
    category: str


def load_samples(source: str, config: RunConfig, needs_category: bool = False) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """The samples of `source` in file order (all rows, also unusable ones), and notes on columns that are not there.

    A column for the input or the category that is in no row is taken as empty, with a note; the category only if
    `needs_category` is false, the input only if `input_column` is not set by hand.

    Raises:
        DataError: the file is missing or malformed, has no row, or lacks a column that is needed.
    """
    rows = read_rows(source)
    if not rows:
        raise DataError(f"'{source}' has no rows: give a file with at least one sample.", source=source)
    notes = _check_columns(rows, source, config, needs_category)
    columns = (config.instruction_column, config.input_column, config.output_column, config.category_column)
    return tuple(Sample(*(_text(row.get(column)) for column in columns)) for row in rows), notes


def read_rows(source: str) -> Sequence[Row]:
    """All rows of a `.json`, `.jsonl` or `.parquet` file, of `hub:NAME` or `hub:NAME:split`, or of 'embedded'.

    Raises:
        DataError: no such file or data set, an unknown kind of file, or malformed content (with its line number).
    """
    if source.startswith("hub:"):
        return _read_hub(source)
    path = embedded_path("tasks.jsonl") if source == "embedded" else Path(expand(source))
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(
            f"'{source}' is of no kind that can be read: give a .json, .jsonl or .parquet file, or hub:NAME.", source=source
        )
    if not path.is_file():
        raise DataError(
            f"There is no data file '{source}': correct the path, or give hub:NAME for a data set of the hub.", source=source
        )
    try:
        return readers[path.suffix](path)
    except OSError as error:
        raise DataError(f"Data file '{path}' cannot be read: {error.strerror or error}.", source=source) from None
    except UnicodeDecodeError as error:
        raise DataError(f"Data file '{path}' is not UTF-8 (byte {error.start}): save it as UTF-8.", source=source) from None


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"Data file '{path}' is not valid JSON at line {error.lineno}: {error.msg}. "
            "If it has one object a line, name it .jsonl.",
            line=error.lineno,
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"Data file '{path}' holds a JSON {type(rows).__name__}: a list of objects was expected.")
    for number, row in enumerate(rows, 1):
        _check_row(row, path, f"row {number}")
    return rows


def _read_json_lines(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"Data file '{path}' is not valid JSON at line {number}: {error.msg}. Correct or remove that line.",
                    line=number,
                ) from None
            _check_row(row, path, f"line {number}")
            rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import read_table
    except ImportError:
        raise DataError("Parquet files need pyarrow: install it with `pip install 'fedtune[parquet]'`.") from None
    try:
        rows: list[Row] = read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"Data file '{path}' is not a valid Parquet file: {str(error).rstrip('.')}.") from None
    return rows


def _read_hub(source: str) -> Sequence[Row]:
    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            "Data sets of the hub need the package datasets: install it with `pip install 'fedtune[datasets]'`."
        ) from None
    try:
        return list(load_dataset(name, split=split or "train"))
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"Data set '{source}' cannot be loaded ({first}): check name, split and connection.", source=source
        ) from None


def _check_row(row: object, path: Path, place: str) -> None:
    if not isinstance(row, dict):
        raise DataError(
            f"Data file '{path}' has a {type(row).__name__} at {place}: every row must be an object with named columns."
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


def _text(value: object) -> str:
    """The text of a cell: None is "", numbers and truth values as JSON writes them, lists and objects as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
