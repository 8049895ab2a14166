"""The tidy table of an experiment: one row per preset, algorithm, seed and round, as CSV and as Parquet.

Everything that compares algorithms reads this table and nothing else: `fedtune.report.figures` draws it, a spreadsheet or a
data frame opens it. Columns that a run did not measure are null: empty in CSV, null in Parquet. A number that is not finite
is written as null too, as in metrics.jsonl.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from fedtune.errors import MissingPackageError, TableError
from fedtune.foreign import for_screen
from fedtune.regular import read_regular
from fedtune.run_folder import replace_file

CSV, PARQUET = ".csv", ".parquet"


@dataclass(frozen=True)
class Row:
    """What was measured after one round of one run; round 0 is the base model.

    Attributes:
        preset, algorithm, seed: which run; runs that differ in `seed` only are repetitions of one another.
        label: how the algorithm is called in figures ("FedKSeed", "LoRA, rank 8").
        eval_loss, eval_loss_sample_mean: held-out loss in nats: mean over tokens, and mean over samples of their means.
        accuracy: share of held-out questions whose right answer is the most likely one.
        rouge_l, exact_match: of generated responses, 0 to 1.
        bytes_up, bytes_down: payload of this round, all clients together.
        cumulative_bytes: payload of rounds 0 .. `round`, both directions, all clients together.
        serialised_bytes: the same as serialised by Flower, cumulative.
        seconds, cpu_seconds: of the run so far, by the clock and by the processor.
        peak_memory_bytes: the most memory that the run had used so far.
        link_seconds: what the messages so far would take on a simulated link, cumulative; no computation.
    """

    preset: str
    algorithm: str
    label: str
    seed: int
    round: int
    eval_loss: float | None = None
    eval_loss_sample_mean: float | None = None
    accuracy: float | None = None
    rouge_l: float | None = None
    exact_match: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    cumulative_bytes: int = 0
    serialised_bytes: int | None = None
    seconds: float = 0.0
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    link_seconds: float | None = None


COLUMNS = tuple(field.name for field in fields(Row))
_KINDS: dict[str, str] = {field.name: str(field.type) for field in fields(Row)}  # "int", "float | None", ...
_SCORES = ("eval_loss", "eval_loss_sample_mean", "accuracy", "rouge_l", "exact_match")
_NEEDED = ("preset", "algorithm", "label", "seed", "round")


def rows_of(metrics: Iterable[Mapping[str, Any]], *, preset: str, algorithm: str, label: str, seed: int) -> list[Row]:
    """The rows of one run from its lines of metrics.jsonl, with bytes and seconds added up round by round.

    `seconds` and `cpu_seconds` add the phases of the rounds; columns that metrics.jsonl has nothing about are null.
    """
    total, serialised, seconds, rows = 0, 0, 0.0, []
    cpu: float | None = 0.0
    for line in metrics:
        up, down = int(measured(line.get("bytes_up")) or 0), int(measured(line.get("bytes_down")) or 0)
        total += up + down
        whole = [measured(line.get(name)) for name in ("serialised_up", "serialised_down")]
        serialised += sum(int(value or 0) for value in whole)
        seconds += _phases(line, "seconds") or 0.0
        worked = _phases(line, "cpu_seconds")
        cpu = None if cpu is None or worked is None else cpu + worked
        scores: dict[str, Any] = {name: measured(line.get(name)) for name in _SCORES}
        counts: dict[str, Any] = {"bytes_up": up, "bytes_down": down, "cumulative_bytes": total}
        counts["serialised_bytes"] = serialised if None not in whole else None
        counts["cpu_seconds"] = None if cpu is None else round(cpu, 4)
        number = int(measured(line.get("round")) or 0)
        rows.append(Row(preset, algorithm, label, seed, number, **scores, **counts, seconds=round(seconds, 4)))
    return rows


def _phases(line: Mapping[str, Any], name: str) -> float | None:
    """The sum of the phases of a round; None if it has none."""
    phases = line.get(name)
    return sum(measured(value) or 0.0 for value in phases.values()) if isinstance(phases, Mapping) else None


# ---------------------------------------------------------------------- writing


def write(table: Sequence[Row], path: Path) -> Path:
    """Write `table` as CSV or Parquet, as the name of `path` ends; a file that is there is replaced, whole or not at all.

    Raises:
        TableError: another ending. MissingPackageError: Parquet without pyarrow. RunFolderError: the disk refuses.
    """
    replace_file(path, _encoders(path)(table))
    return path


def _encoders(path: Path) -> Any:
    return _by_ending(path, {CSV: to_csv, PARQUET: to_parquet})


def to_csv(table: Sequence[Row]) -> bytes:
    """RFC 4180 in UTF-8, a line of names, then a line a row; floats with as many digits as bring the same number back."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # lines end with CR LF, so that both are quoted inside a text
    writer.writerow(COLUMNS)
    writer.writerows([_as_text(value) for value in _plain(row).values()] for row in table)
    return text.getvalue().encode()


def to_parquet(table: Sequence[Row]) -> bytes:
    """One row group, columns in the order of Row. Raises MissingPackageError without pyarrow."""
    arrow = _arrow()
    kinds = {"str": arrow.string(), "int": arrow.int64(), "float": arrow.float64()}
    schema = arrow.schema([(name, kinds[kind.split(" ")[0]]) for name, kind in _KINDS.items()])
    sink = io.BytesIO()
    arrow.parquet.write_table(arrow.Table.from_pylist([_plain(row) for row in table], schema=schema), sink)
    return sink.getvalue()


# ---------------------------------------------------------------------- reading


def read(path: Path) -> list[Row]:
    """The rows of a CSV or Parquet file that `write` made; columns that a Row does not have are left out.

    Raises:
        TableError: another ending, no such file, a column is missing, or a value is of another type.
    """
    decode = _by_ending(path, {CSV: _from_csv, PARQUET: _from_parquet})
    try:
        rows = enumerate(decode(read_regular(path, MOST_BYTES), path), start=1)
        table = [_row(values, path, number) for number, values in islice(rows, MOST_ROWS + 1)]
    except OSError as error:
        raise TableError(f"'{path}' cannot be read as a table: {error.strerror or error}.", path=str(path)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"'{path}' cannot be read as a table: {error}.", path=str(path)) from error
    if len(table) > MOST_ROWS:
        raise TableError(f"'{path}' has more than {MOST_ROWS:,} rows: not a table of fedtune.", path=str(path))
    return table


def _from_csv(data: bytes, path: Path) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(data.decode(), newline=""))
    _check_columns(reader.fieldnames or (), path)
    return reader


def _check_columns(names: Iterable[str], path: Path) -> None:
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise TableError(f"'{path}' has no column {', '.join(missing)}: not a table of fedtune.", path=str(path))


def _from_parquet(data: bytes, path: Path) -> Iterator[dict[str, Any]]:
    """The rows, a batch of them at a time: a few bytes can spell millions of rows."""
    arrow = _arrow()
    try:
        file = arrow.parquet.ParquetFile(io.BytesIO(data))
        _check_columns(file.schema_arrow.names, path)
        known = [name for name in COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=known):
            yield from batch.to_pylist()
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        first = for_screen(str(error).split("\n", 1)[0])
        raise TableError(f"'{path}' is not a Parquet file that can be read: {first}.", path=str(path)) from error


def _row(values: Mapping[str, Any], path: Path, number: int) -> Row:
    missing = [name for name in _NEEDED if values.get(name) is None]
    if missing:
        raise TableError(f"Row {number} of '{path}' has no {', '.join(missing)}: not a table of fedtune.", path=str(path))
    known = {name: values[name] for name in COLUMNS if values.get(name) is not None}
    try:
        typed = {name: _typed(value, _KINDS[name]) for name, value in known.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise TableError(
            f"Row {number} of '{path}' is damaged: {for_screen(str(error))}.", path=str(path), row=number
        ) from None
    return Row(**{name: value for name, value in typed.items() if value is not None})


def _typed(value: Any, kind: str) -> Any:
    """A cell in the type of its column; an empty cell of a column that is no text is null."""
    if not isinstance(value, str | int | float):
        raise TypeError(f"a cell holds a {type(value).__name__}")
    if kind == "str":
        return str(value)
    if value == "":
        return None
    return int(value) if kind.startswith("int") else float(value)


# ---------------------------------------------------------------------- both


def _by_ending(path: Path, choices: Mapping[str, Any]) -> Any:
    if path.suffix not in choices:
        raise TableError(f"'{path}' ends in neither {CSV} nor {PARQUET}: give it one of these endings.", path=str(path))
    return choices[path.suffix]


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError.of("pyarrow", "Parquet tables", "experiments") from None
    return pyarrow


def _plain(row: Row) -> dict[str, Any]:
    """The cells of a row; what is not finite is null."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in asdict(row).items()}


def _as_text(value: str | int | float | None) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


LARGEST = 1e60  # of a number that is shown or added: sums of such are finite
MOST_BYTES, MOST_ROWS = 1 << 26, 300_000  # of a file that is read


def measured(value: object) -> float | None:
    """What stands in metrics.jsonl or another file as a finite number below LARGEST in size; None for anything else."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
    return float(value) if known and isinstance(value, int | float) else None
