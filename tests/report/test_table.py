"""The tidy table: written and read back as CSV and Parquet, refused with a reason where it is none."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.errors import MissingPackageError, TableError
from fedtune.report.table import COLUMNS, Row, read, rows_of, to_csv, write

LINES = [
    {"round": 0, "eval_loss": 2.0, "bytes_up": 0, "bytes_down": 0, "seconds": {"evaluate": 0.5}},
    {"round": 1, "eval_loss": None, "bytes_up": 10, "bytes_down": 5, "seconds": {"clients": 1.0, "odd": None}, "more": 1},
    {"round": 2, "eval_loss": 1.5, "rouge_l": 0.25, "bytes_up": 20, "bytes_down": 15, "seconds": {"clients": 2.0}},
]
ROWS = [
    Row(
        "demo", "ferret", 'Ferret, "512" = 5', 0, 0, 0.1 + 0.2, None, 0.75, 0.5, 1.0, 1, 2, 2**40, None, 0.25, 1.5, 10**12, None
    ),
    Row("demo", "local", "", -1, 1),
]
finite = st.none() | st.floats(allow_nan=False, allow_infinity=False)
count = st.integers(0, 2**62)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_what_is_written_is_read_back(tmp_path: Path, ending: str) -> None:
    path = write(ROWS, tmp_path / f"table{ending}")
    assert read(path) == ROWS
    assert write(read(path), path).read_bytes() == write(ROWS, tmp_path / f"again{ending}").read_bytes()
    assert read(write([], tmp_path / f"empty{ending}")) == []


any_row = st.builds(Row, st.text(max_size=8), st.text(max_size=8), st.just("A"), count, count, finite, seconds=st.floats(0, 9))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
@given(st.lists(any_row, max_size=4))
def test_any_text_and_number_survives_csv(tmp_path_factory: pytest.TempPathFactory, table: list[Row]) -> None:
    path = tmp_path_factory.mktemp("any") / "table.csv"
    assert read(write(table, path)) == table


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, ending: str, value: float) -> None:
    path = write([Row("p", "a", "A", 0, 1, eval_loss=value)], tmp_path / f"table{ending}")
    assert read(path)[0].eval_loss is None


def test_rows_of_a_run_add_up() -> None:
    rows = rows_of(LINES, preset="demo", algorithm="ferret", label="Ferret", seed=3)
    assert [row.cumulative_bytes for row in rows] == [0, 15, 50]
    assert [row.seconds for row in rows] == [0.5, 1.5, 3.5]
    assert [row.eval_loss for row in rows] == [2.0, None, 1.5]
    assert rows[2].rouge_l == 0.25
    assert {row.seed for row in rows} == {3}


def test_extra_columns_are_left_out_and_optional_ones_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("label,preset,algorithm,seed,round,colour\nA,p,a,1,2,red\n", encoding="utf-8")
    assert read(path) == [Row("p", "a", "A", 1, 2)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("preset,algorithm\np,a\n", "has no column label, seed, round"),
        (f"{','.join(COLUMNS)}\np,a,A,0,one{',' * 12}\n", "is damaged"),
        ("\udc80", "cannot be read"),
    ],
)
def test_no_table_is_refused_with_its_reason(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TableError, match=reason):
        read(path)


def test_other_endings_missing_files_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"neither \.csv nor \.parquet"):
        write(ROWS, tmp_path / "table.xlsx")
    with pytest.raises(TableError, match="cannot be read"):
        read(tmp_path / "none.csv")
    (tmp_path / "other.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(TableError, match="not a Parquet file"):
        read(tmp_path / "other.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'fedtune\[experiments\]'"):
        write(ROWS, tmp_path / "table.parquet")
    assert to_csv(ROWS).startswith(b"preset,algorithm,label,")


HEAD = "preset,algorithm,label,seed,round,eval_loss\r\n"


@pytest.mark.parametrize(
    "content",
    [
        (HEAD + "a,b,c,1" + "0" * 6000 + ",0,1\r\n").encode(),
        (HEAD + "a,b,c,0,0," + "x" * 200_000 + "\r\n").encode(),
        (HEAD + "a,b,c,0,0,1" + ",more" * 1000 + "\r\nq\r\n").encode(),
        HEAD.encode() + b"\xff,b,c,0,0,1\r\n",
        HEAD.encode() + b"a\x00,b,c,x,0,1\r\n",
        bytes(5000),
        b"[" * 100_000,
    ],
)
def test_a_table_with_odd_content_is_refused(content: bytes, tmp_path: Path) -> None:
    for name in ("table.csv", "table.parquet"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TableError):
            read(tmp_path / name)


def test_what_is_no_file_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "device.parquet").symlink_to("/dev/zero")
    (tmp_path / "sparse.csv").touch()
    os.truncate(tmp_path / "sparse.csv", 3 << 30)
    for path in tmp_path.iterdir():
        with pytest.raises(TableError, match="cannot be read"):
            read(path)


def test_a_few_bytes_of_parquet_are_not_millions_of_rows(tmp_path: Path) -> None:
    """A column of one value costs a few bytes, however often it is there."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = 400_000
    columns = {name: ["a"] * rows for name in ("preset", "algorithm", "label")} | {
        name: [0] * rows for name in ("seed", "round")
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet", use_dictionary=True, compression="zstd")
    assert (tmp_path / "table.parquet").stat().st_size < 20_000
    with pytest.raises(TableError, match="has more than 300,000 rows"):
        read(tmp_path / "table.parquet")


def test_parquet_cells_of_other_types_are_refused(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for odd in ([1], {"a": 1}, b"x", None):
        row = {"preset": "a", "algorithm": "b", "label": "c", "seed": odd, "round": 0}
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "table.parquet")
        with pytest.raises(TableError):
            read(tmp_path / "table.parquet")
