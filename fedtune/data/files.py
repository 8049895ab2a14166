"""Reading rows: a JSON, JSON Lines or Parquet file, or a data set of the hub -> mappings from column to value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

from fedtune.embedded import embedded_path
from fedtune.errors import DataError
from fedtune.regular import open_regular
from fedtune.source_names import expand

Row = Mapping[str, Any]


def read_rows(source: str) -> Sequence[Row]:
    """All rows of a `.json`, `.jsonl` or `.parquet` file, of `hub:NAME` or `hub:NAME:split`, or of 'embedded'.

    Raises:
        DataError: no such file or data set, an unknown kind of file, no regular file, one larger than LARGEST_DATA, or
            malformed content (with its line number).
    """
    if source.startswith("hub:"):
        return _read_hub(source)
    path = embedded_path("tasks.jsonl") if source == "embedded" else Path(expand(source))
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(
            f"'{source}' is of no kind that can be read: give a .json, .jsonl or .parquet file, or hub:NAME.", source=source
        )
    try:
        with open_regular(path) as file:
            return readers[path.suffix](file, path)
    except FileNotFoundError:
        raise DataError(
            f"There is no data file '{source}': correct the path, or give hub:NAME for a data set of the hub.", source=source
        ) from None
    except OSError as error:
        raise DataError(f"Data file '{path}' cannot be read: {error.strerror or error}.", source=source) from None
    except UnicodeDecodeError as error:
        raise DataError(f"Data file '{path}' is not UTF-8 (byte {error.start}): save it as UTF-8.", source=source) from None


def _read_json(file: BinaryIO, path: Path) -> list[Row]:
    try:
        rows = json.loads(file.read().decode())
    except json.JSONDecodeError as error:
        raise DataError(
            f"Data file '{path}' is not valid JSON at line {error.lineno}: {error.msg}. "
            "If it has one object a line, name it .jsonl.",
            line=error.lineno,
        ) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise _beyond(path, "somewhere", error) from None
    if not isinstance(rows, list):
        raise DataError(f"Data file '{path}' holds a JSON {type(rows).__name__}: a list of objects was expected.")
    for number, row in enumerate(rows, 1):
        _check_row(row, path, f"row {number}")
    return rows


def _read_json_lines(file: BinaryIO, path: Path) -> list[Row]:
    rows = []
    with TextIOWrapper(file, encoding="utf-8") as lines:
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
            except (ValueError, RecursionError) as error:
                raise _beyond(path, f"at line {number}", error) from None
            _check_row(row, path, f"line {number}")
            rows.append(row)
    return rows


def _read_parquet(file: BinaryIO, path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise DataError("Parquet files need pyarrow: install it with `pip install 'fedtune[parquet]'`.") from None
    try:
        rows: list[Row] = read_table(file).to_pylist()
    except (ArrowException, ValueError, OverflowError) as error:  # the others: of values in it
        raise DataError(f"Data file '{path}' is not a valid Parquet file: {str(error).rstrip('.')}.") from None
    return rows


def _beyond(path: Path, place: str, error: Exception) -> DataError:
    """For JSON that is none of a row: brackets in brackets without end, a number of thousands of digits."""
    what = "brackets too deep in one another" if isinstance(error, RecursionError) else "a number with too many digits"
    return DataError(f"Data file '{path}' has {what} {place}: correct or remove that row.")


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
