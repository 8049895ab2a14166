"""A run folder from somebody else (ledger, JSON, coefficients): whatever it holds, a reader ends and says what is wrong."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from fedtune.chain import link
from fedtune.cli.main import main
from fedtune.control import said
from fedtune.errors import FedtuneError, LedgerError, RunFolderError
from fedtune.export import delta_of_run
from fedtune.ledger import START, Ledger, Used, updates_digest
from fedtune.ledger_file import LEDGER
from fedtune.report.run import read_run
from fedtune.resume import stored_settings
from fedtune.run_folder import COEFFICIENTS, CONFIG, METRICS, SUMMARY, VERSIONS, RunFolder
from fedtune.verify import verify
from tests.fuzz.harness import bounded, fuzz
from tests.fuzz.mutations import another_value, as_json, mutated, noise, values

Draw = Callable[[st.SearchStrategy[Any]], Any]
DATA = st.data()


def copy_of(run_folder: Path, folder: Path) -> Path:
    """A copy to damage, in place of the one before."""
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(run_folder, place, ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    return place


def read_everything(place: Path) -> None:
    """All that a ledger has."""
    with Ledger.open(place) as ledger:
        _ = ledger.header, ledger.last, ledger.snapshot, ledger.pools(), ledger.damage()
        for row in ledger.rounds():
            ledger.updates(row.number)
        list(ledger.events())
        verify(ledger)


# ---------------------------------------------------------------------------------------------------- the file of the ledger


@fuzz(DATA, short=60)
def test_a_ledger_with_damaged_bytes_is_read_or_refused(run_folder: Path, folder: Path, data: st.DataObject) -> None:
    place = copy_of(run_folder, folder)
    sound = (run_folder / LEDGER).read_bytes()
    damaged = data.draw(mutated([sound]), label="ledger")
    (place / LEDGER).write_bytes(damaged if len(damaged) != len(sound[: len(damaged)]) else damaged + sound[len(damaged) :])
    bounded(damaged, lambda _: read_everything(place), LedgerError)


# ---------------------------------------------------------------------------------------------------- cells

TABLES = {
    "header": ("created", "versions", "asked", "used", "fingerprint", "layout", "shapes", "partition", "pool"),
    "rounds": (
        "number",
        "attempt",
        "clients",
        "refused",
        "train_loss",
        "traffic",
        "seconds",
        "cpu_seconds",
        "elapsed",
        "state",
    ),
    "updates": ("client", "share", "payload"),
    "events": ("round", "kind", "detail", "elapsed"),
    "snapshot": ("round", "moves", "arrays"),
    "pools": ("number", "coefficients"),
}
CELL = (
    values().map(lambda value: as_json(value).decode())
    | st.sampled_from([b"", b"\xff" * 16, "[" * 3000, '{"a":' * 3000, "9" * 5000, 2**62, -1, 1e308, "\x1b[31m", "[/]"])
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=20)
)


def rechain(connection: sqlite3.Connection) -> None:
    """Compute every digest anew, as somebody does who has written other cells."""
    header = connection.execute("SELECT * FROM header").fetchone()
    head = link(START, "header", header[1:-1])
    connection.execute("UPDATE header SET digest = ?", (head,))
    heads = {}
    for table in ("rounds", "events"):
        previous = head
        for row in connection.execute(f"SELECT rowid, * FROM {table} ORDER BY number").fetchall():
            columns = list(row[1:-2])
            if table == "rounds":
                columns[-1] = _updates_digest(connection, columns[0])
            digest = link(previous, table, columns)
            used = ", used = ?" if table == "rounds" else ""
            connection.execute(
                f"UPDATE {table} SET previous = ?, digest = ?{used} WHERE rowid = ?",
                (previous, digest, *([columns[-1]] if used else []), row[0]),
            )
            previous = digest
        heads[table] = previous
    snapshot = connection.execute("SELECT * FROM snapshot").fetchone()
    columns = (*snapshot[1:4], heads["rounds"], heads["events"])
    connection.execute(
        "UPDATE snapshot SET rounds_head = ?, events_head = ?, digest = ?", (*columns[3:], link(START, "snapshot", columns))
    )


def _updates_digest(connection: sqlite3.Connection, number: int) -> bytes:
    query = "SELECT client, share, payload FROM updates WHERE round = ? ORDER BY client"
    return updates_digest(number, [Used(*row) for row in connection.execute(query, (number,))])


def with_another_cell(place: Path, data: st.DataObject) -> None:
    """One cell is another, and all digests fit. What the file itself refuses stays as it was."""
    table = data.draw(st.sampled_from(sorted(TABLES)), label="table")
    column = data.draw(st.sampled_from(TABLES[table]), label="column")
    with closing(sqlite3.connect(place / LEDGER, isolation_level=None)) as connection:
        rows = [row[0] for row in connection.execute(f"SELECT rowid FROM {table}")]
        row = data.draw(st.sampled_from(rows), label="row")
        before = connection.execute(f"SELECT {column} FROM {table} WHERE rowid = ?", (row,)).fetchone()[0]
        try:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (_cell(data, before), row))
            rechain(connection)
        except (sqlite3.Error, OverflowError, ValueError):  # of another type than the column, or a number that does not fit
            return


def _cell(data: st.DataObject, before: Any) -> Any:
    """Another value; every other time nearly that of `before`."""
    if isinstance(before, str) and before[:1] in "[{" and data.draw(st.booleans()):
        return as_json(data.draw(another_value(json.loads(before)), label="JSON")).decode()
    if isinstance(before, bytes) and data.draw(st.booleans()):
        return data.draw(mutated([before]), label="bytes")
    found = data.draw(CELL, label="cell")
    return found.encode("utf-8", "replace").decode() if isinstance(found, str) else found


def command(*arguments: str) -> None:
    """Run a command; its exit code and its errors are those of `main`."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, 1)


@fuzz(DATA, short=80)
def test_a_ledger_with_crafted_cells_is_read_or_refused(run_folder: Path, folder: Path, data: st.DataObject) -> None:
    place = copy_of(run_folder, folder)
    with_another_cell(place, data)
    bounded(b"", lambda _: read_everything(place), LedgerError, measured=False)
    bounded(b"", lambda _: stored_settings(RunFolder.open(place)), FedtuneError, measured=False)


@fuzz(DATA, short=15)
def test_commands_on_a_ledger_with_crafted_cells_end_with_a_sentence(
    run_folder: Path, folder: Path, data: st.DataObject, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copy_of(run_folder, folder)
    with_another_cell(place, data)
    for words in (("status",), ("ledger", "show"), ("ledger", "verify"), ("report",)):
        command(*words, str(place))
        printed = capsys.readouterr()
        assert "Unexpected" not in printed.err, words
        assert "\x1b[" not in printed.out + printed.err, words


# ---------------------------------------------------------------------------------------------------- JSON and coefficients


def read_folder(place: Path) -> None:
    """What reports, comparisons and commands read of the files beside the ledger; each may refuse."""
    folder = RunFolder(place)
    readers: tuple[Callable[[], object], ...] = (
        folder.config, folder.read_metrics, folder.summary, lambda: said(folder), lambda: stored_settings(folder),
    )  # fmt: skip
    for read in readers:
        try:
            read()
        except FedtuneError:
            continue
    read_run(place)


JSON_FILES = (CONFIG, SUMMARY, VERSIONS, "partition.json", "status.json", "generated_round_0.json", METRICS)


@fuzz(DATA, short=80)
def test_a_run_folder_with_other_json_is_read_or_refused(run_folder: Path, folder: Path, data: st.DataObject) -> None:
    place = copy_of(run_folder, folder)
    name = data.draw(st.sampled_from(JSON_FILES), label="file")
    lines = (run_folder / name).read_bytes()
    sound = [json.loads(line) for line in lines.splitlines()] if name == METRICS else json.loads(lines)
    kind = data.draw(st.sampled_from(("value", "value", "bytes", "deep", "long")), label="kind")
    if kind == "value":
        other = data.draw(another_value(sound), label="document")
        content = b"\n".join(map(as_json, other)) + b"\n" if name == METRICS and isinstance(other, list) else as_json(other)
    else:
        content = {"bytes": data.draw(mutated([lines])), "deep": b"[" * 5000 + b"\n", "long": b"9" * 6000 + b"\n"}[kind]
    (place / name).write_bytes(content)
    bounded(content, lambda _: read_folder(place), RunFolderError)


@fuzz(DATA, short=40)
def test_other_coefficients_are_read_or_refused(run_folder: Path, folder: Path, data: st.DataObject) -> None:
    place = copy_of(run_folder, folder)
    sound = (run_folder / COEFFICIENTS).read_bytes()
    content = data.draw(mutated([sound]) | noise(*(sound[:at] for at in (3, 8, 60, 68))), label="coefficients")
    (place / COEFFICIENTS).write_bytes(content)
    bounded(content, lambda _: delta_of_run(RunFolder.open(place)), FedtuneError, measured=False)
