"""Small files that people write or are sent: deltas, presets and comparisons, data, tables, commands."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from fedtune.coefficients import Coefficients
from fedtune.config import RunConfig, read_setting
from fedtune.control import Order
from fedtune.data.files import read_rows
from fedtune.data.samples import load_samples
from fedtune.delta import Delta, encode
from fedtune.delta_reader import decode
from fedtune.delta_reader import read as read_delta
from fedtune.errors import ConfigError, ControlError, DataError, DeltaError, TableError
from fedtune.experiments import arms
from fedtune.report import table
from fedtune.report.table import Row
from tests.fuzz.harness import bounded, fuzz
from tests.fuzz.messages import SHAPES, Shape
from tests.fuzz.mutations import documents, mutated, noise, values


def file_reader(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Reads what is at `path` after the input is written there."""

    def of(data: bytes) -> object:
        path.write_bytes(data)
        return read()

    return of


# ---------------------------------------------------------------------------------------------------- deltas


def delta(shape: Shape) -> bytes:
    """Pools 0 and 2 of a run."""
    pools = (shape.coefficients(0, 0.3), shape.coefficients(2, 0.5))
    return encode(
        Delta(
            base="org/name", dtype="float32", fingerprint=b"f" * 16, tensors=b"t" * 16, layout=b"l" * 16, block_rule="grouped",
            block_sizes=(10,) * shape.blocks, digest=Coefficients(pools).digest(b"f" * 16), round=3, pool_every=1,
            family="hadamard", rank=1, size=shape.size, numbers=(0, 2), pools=pools, program="0.1.0",
        )
    )  # fmt: skip


DELTAS = [delta(shape) for shape in SHAPES[:3]]


def test_the_deltas_to_begin_from_are_sound() -> None:
    assert [len(decode(data).pools) for data in DELTAS] == [2, 2, 2]


@fuzz(mutated(DELTAS) | noise(*(data[:at] for data in DELTAS for at in (1, 8, 60))))
def test_a_delta_is_read_or_refused(data: bytes) -> None:
    found = bounded(data, decode, DeltaError)
    if found is not None:
        assert encode(found) == data
        assert all(np.isfinite(pool.values).all() for pool in found.pools)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A sound delta with a header that says something else."""
    data = draw(st.sampled_from(DELTAS))
    end = 8 + int.from_bytes(data[:8], "little")
    text = draw(documents(json.loads(data[8:end])))
    return len(text).to_bytes(8, "little") + text + data[end:]


@fuzz(headers(), short=80)
def test_a_delta_with_another_header_is_read_or_refused(data: bytes, folder: Path) -> None:
    path = folder / "delta.safetensors"
    bounded(data, file_reader(path, lambda: read_delta(path)), DeltaError)


# ---------------------------------------------------------------------------------------------------- settings

PRESET = b"""# A preset
algorithm = "ferret"
lr = 1e-3
K = 200
rounds = 3
clients = 4
model = "embedded"
data = "${HOME:-x}/rows.jsonl"
holdout_category = "unseen"
"""
COMPARISON = PRESET + b'[arms.ferret]\nlr = 1e-2\n[arms.fed]\nalgorithm = "fedavg"\nlabel = "FedAvg"\n'


@st.composite
def settings(draw: st.DrawFn) -> bytes:
    """A line of a preset with another value."""
    key = draw(st.sampled_from(sorted(RunConfig.model_fields)) | st.text(max_size=12))
    value = draw(values().map(repr) | st.text(max_size=40) | st.integers(1, 5000).map(lambda depth: "[" * depth))
    place = draw(st.sampled_from((PRESET, b"", COMPARISON)))
    return f"{key} = {value}\n".encode("utf-8", "surrogatepass") + place


TOML = settings() | settings() | mutated([PRESET, COMPARISON]) | noise(b"a = ", b"\xef\xbb\xbf", b"[arms.")


@fuzz(TOML)
def test_a_preset_is_read_or_refused(data: bytes, folder: Path) -> None:
    path = folder / "preset.toml"
    found = bounded(data, file_reader(path, lambda: RunConfig.load(path)), ConfigError)
    if isinstance(found, RunConfig):
        assert RunConfig.from_mapping(found.as_mapping()) == found


@fuzz(TOML, short=100)
def test_a_comparison_is_read_or_refused(data: bytes, folder: Path) -> None:
    path = folder / "comparison.toml"

    def read() -> None:
        comparison = arms.load(path)
        for arm in arms.choose(comparison, ""):
            arms.config_of(comparison, arm, {})

    bounded(data, file_reader(path, read), ConfigError)


KEYS = st.sampled_from(sorted(RunConfig.model_fields)) | st.text(max_size=8)


@fuzz(st.tuples(KEYS, st.text(max_size=60) | values().map(repr)).map("=".join))
def test_a_setting_of_the_command_line_is_read_or_refused(text: str) -> None:
    def read(_: bytes) -> RunConfig:
        return RunConfig.from_mapping(dict([read_setting(text)]))

    bounded(text.encode("utf-8", "surrogatepass"), read, ConfigError)


# ---------------------------------------------------------------------------------------------------- data

ROWS = [
    {"instruction": f"Name {number}.", "input": "", "output": str(number * 7), "category": "ab"[number % 2], "score": 0.5}
    for number in range(6)
]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def parquet() -> bytes:
    """The rows as a Parquet file."""
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def rows_at(path: Path) -> Callable[[bytes], object]:
    """Reads rows, then samples."""

    def read() -> object:
        load_samples(str(path), RunConfig())
        return read_rows(str(path))

    return file_reader(path, read)


@fuzz(documents(ROWS))
def test_a_json_file_is_read_or_refused(data: bytes, folder: Path) -> None:
    bounded(data, rows_at(folder / "rows.json"), DataError)


@fuzz(mutated([LINES]) | st.lists(documents(*ROWS), max_size=4).map(b"\n".join), short=50)
def test_a_file_of_json_lines_is_read_or_refused(data: bytes, folder: Path) -> None:
    bounded(data, rows_at(folder / "rows.jsonl"), DataError)


@fuzz(mutated([parquet()]) | noise(b"PAR1"))
def test_a_parquet_file_is_read_or_refused(data: bytes, folder: Path) -> None:
    """Without a measure of memory: tracemalloc does not see Arrow's, and must not end while a thread of Arrow's frees some."""
    bounded(data, rows_at(folder / "rows.parquet"), DataError, measured=False)


# ---------------------------------------------------------------------------------------------------- tables

TABLE = [
    Row("p", "ferret", label, seed, number, eval_loss=3.0 - number, bytes_up=5, cumulative_bytes=10 * number, seconds=1.5)
    for label in ("a", 'b,"c"')
    for seed in (0, 1)
    for number in (0, 1)
]


@fuzz(mutated([table.to_csv(TABLE)]) | noise(table.to_csv(TABLE)[:60], b"preset,algorithm,label,seed,round\r\n"))
def test_a_table_of_commas_is_read_or_refused(data: bytes, folder: Path) -> None:
    path = folder / "table.csv"
    found = bounded(data, file_reader(path, lambda: table.read(path)), TableError)
    if isinstance(found, list):
        path.write_bytes(table.to_csv(found))
        assert table.to_csv(table.read(path)) == table.to_csv(found)


@fuzz(mutated([table.to_parquet(TABLE), parquet()]) | noise(b"PAR1"))
def test_a_table_of_columns_is_read_or_refused(data: bytes, folder: Path) -> None:
    path = folder / "table.parquet"
    bounded(data, file_reader(path, lambda: table.read(path)), TableError, measured=False)


# ---------------------------------------------------------------------------------------------------- commands


@fuzz(documents({"command": "drop", "client": "site-a"}, {"command": "pause", "client": ""}))
def test_a_command_is_read_or_refused(data: bytes) -> None:
    found = bounded(data, Order.read, ControlError)
    assert found is None or bool(found.client) == (found.command.value == "drop")
