"""Reading data files: the same samples from every format, and an error that says where a file is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedtune.config import RunConfig
from fedtune.data.files import read_rows
from fedtune.data.samples import Sample, load_samples
from fedtune.errors import DataError

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "red", "category": "colours"},
    {"instruction": "Add.", "input": "2 and 3", "output": 5, "category": None},
    {"instruction": "Sag: Grüße\nzweite Zeile", "input": None, "output": "grüß dich", "category": "greetings"},
]
SAMPLES = (
    Sample("Name a colour.", "", "red", "colours"),
    Sample("Add.", "2 and 3", "5", ""),
    Sample("Sag: Grüße\nzweite Zeile", "", "grüß dich", "greetings"),
)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_json_and_json_lines_give_the_same_samples(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    for source in (write(tmp_path / "a.json", json.dumps(ROWS)), write(tmp_path / "a.jsonl", lines)):
        assert load_samples(source, RunConfig()) == (SAMPLES, ())


def test_parquet_gives_the_same_samples(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{**row, "output": str(row["output"])} for row in ROWS]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_samples(str(tmp_path / "a.parquet"), RunConfig()) == (SAMPLES, ())
    with pytest.raises(DataError, match=r"is not a valid Parquet file"):
        read_rows(write(tmp_path / "b.parquet", "no parquet at all"))


def test_columns_are_mapped(tmp_path: Path) -> None:
    source = write(tmp_path / "a.json", '[{"q": "Why?", "context": "c", "a": "So.", "kind": 3}]')
    config = RunConfig(instruction_column="q", input_column="context", output_column="a", category_column="kind")
    assert load_samples(source, config)[0] == (Sample("Why?", "c", "So.", "3"),)


def test_variables_in_a_path_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.json", json.dumps(ROWS))
    monkeypatch.setenv("FEDTUNE_TEST_DATA", str(tmp_path))
    assert len(read_rows("${FEDTUNE_TEST_DATA}/a.json")) == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"not valid JSON at line 3: .* Correct or remove that line\."),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"has a list at line 2: every row must be an object"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', r"not valid JSON at line 2: .* If it has one object a line, name it \.jsonl\."),
        ("a.json", '{"data": []}', r"holds a JSON dict: a list of objects was expected"),
        ("a.json", '[{"a": 1}, "text"]', r"has a str at row 2"),
        ("a.json", "[]", r"has no rows: give a file with at least one sample"),
        ("a.txt", "hello", r"is of no kind that can be read: give a \.json, \.jsonl or \.parquet file, or hub:NAME"),
    ],
)
def test_a_malformed_file_is_refused_with_the_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_samples(write(tmp_path / name, text), RunConfig())


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no data file .*nowhere\.json': correct the path"):
        read_rows(str(tmp_path / "nowhere.json"))
    (tmp_path / "a.json").write_bytes("[1, 'grün']".encode("latin-1"))
    with pytest.raises(DataError, match=r"is not UTF-8 \(byte 7\): save it as UTF-8"):
        read_rows(str(tmp_path / "a.json"))


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    source = write(tmp_path / "a.json", '[{"prompt": "a", "output": "b"}, {"text": "c"}]')
    with pytest.raises(
        DataError,
        match=r"no column 'instruction' \(instruction_column\); its columns are output, prompt, text\. Set instruction_column",
    ):
        load_samples(source, RunConfig())
    with pytest.raises(DataError, match=r"no column 'context' \(input_column\)"):
        load_samples(source, RunConfig(instruction_column="prompt", input_column="context"))
    with pytest.raises(DataError, match=r"no column 'category' \(category_column\)"):
        load_samples(source, RunConfig(instruction_column="prompt"), needs_category=True)


def test_absent_optional_columns_are_noted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.json", '[{"instruction": "a", "output": "b"}]')
    samples, notes = load_samples(source, RunConfig())
    assert samples == (Sample("a", "", "b", ""),)
    assert [note.split(" in ")[0] for note in notes] == ["data: no column 'input'", "data: no column 'category'"]
    assert load_samples(source, RunConfig(input_column="", category_column=""))[1] == ()


def test_hub_data_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"install it with `pip install 'fedtune\[datasets\]'`"):
        read_rows("hub:org/name")


def test_hub_data_is_read_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str) -> list[dict[str, str]]:
            if name != "org/name":
                raise OSError("no connection.\nlong story")
            return [{"split": split}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert read_rows("hub:org/name") == [{"split": "train"}]
    assert read_rows("hub:org/name:test[:5]") == [{"split": "test[:5]"}]
    with pytest.raises(DataError, match=r"'hub:other' cannot be loaded \(no connection\): check name, split and connection"):
        read_rows("hub:other")
