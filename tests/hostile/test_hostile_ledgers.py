"""A ledger with anything in any cell, and all digests right, or with any byte changed: it is read, or the cell is named."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import forge
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import Told, in_time

from fedtune.errors import DamagedLedgerError, LedgerError
from fedtune.ledger import Ledger
from fedtune.ledger_file import LEDGER
from fedtune.replay import Rules, restore
from fedtune.resume import settings_of
from fedtune.verify import check_chains, verify
from server.opening import elapsed_of

JSON_COLUMNS = {
    "header": ("versions", "asked", "used", "shapes"),
    "rounds": ("clients", "refused", "traffic", "seconds", "cpu_seconds"),
    "events": ("detail",),
}
NASTY = (
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 900 + "]" * 900,
    '{"0": 1' + "0" * 6000 + "}",
    '{"0": [1e999, NaN]}',
    '{"0": ["\\ud800"], "\\udfff": "\\ud800"}',
    "",
    "null",
    "[[]]",
    '[5, {}, null, "x"]',
    '{"0": {}, "round": "x", "settings": [], "clients": 5, "name": [], "command": 1, "client": {}, "eval_loss": []}',
    '{"0": "x", "algorithm": 5, "rounds": -1, "traffic": {"0": [1, 2]}, "versions": 5}',
    '{"0": [-1, 0, 0, 0, 0, 4611686018427387904]}',
    '[["a", [1099511627776, 1099511627776]]]',
    '[["a", [1073741824, 1024]], ["b", [-1]]]',
    "[]",
    "{}",
)
VALUES = (
    None, 0, -1, 5, 2**62, -(2**63), 0.5, 1e308, -1e308, float("inf"), "", "x", b"", b"x", b"\xff" * 16, b"\0" * 32, b"{}",
    *NASTY,
)  # fmt: skip


@pytest.fixture(scope="session")
def sound(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ledger alone of a finished run, with nothing left in its write-ahead log. Read only."""
    folder = tmp_path_factory.mktemp("ledger")
    shutil.copy(finished / LEDGER, folder / LEDGER)
    raw = sqlite3.connect(folder / LEDGER)
    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    raw.close()
    return folder


def reading(folder: Path) -> list[Callable[[Ledger], object]]:
    """Everything that reads a ledger."""
    return [
        verify,
        check_chains,
        lambda ledger: ledger.header,
        settings_of,
        lambda ledger: list(ledger.rounds()),
        lambda ledger: [ledger.updates(number) for number in range(3)],
        lambda ledger: list(ledger.events()),
        lambda ledger: (ledger.pools(), ledger.pool_count, ledger.last, ledger.round(ledger.last), ledger.snapshot),
        lambda ledger: restore(ledger, Rules.of(ledger.header)),
        elapsed_of,
    ]


def read_all(folder: Path) -> list[LedgerError]:
    """What is raised by whatever reads a ledger, if it is what may be raised."""
    found: list[LedgerError] = []
    with in_time():
        try:
            with Ledger.open(folder) as ledger:
                for read in reading(folder):
                    try:
                        read(ledger)
                    except LedgerError as error:
                        found.append(error)
        except LedgerError as error:
            found.append(error)
    return found


def copied(sound: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(sound, folder))


def test_forging_nothing_leaves_a_sound_ledger(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "copy")
    forge.change(folder / LEDGER, lambda raw: None)
    assert read_all(folder) == []


@pytest.mark.parametrize(("table", "column"), [(table, column) for table, names in JSON_COLUMNS.items() for column in names])
def test_a_nasty_json_cell_with_right_digests_is_named(table: str, column: str, sound: Path, tmp_path: Path) -> None:
    named = 0
    for value in NASTY:
        folder = copied(sound, tmp_path / "copy")
        forge.put(folder / LEDGER, table, column, value)
        found = read_all(folder)
        named += any(error.facts.get("column") == column and error.facts.get("table") == table for error in found)
    assert named >= 9


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.sampled_from(forge.columns()), st.sampled_from(VALUES), st.integers(0, 2))
def test_any_value_in_any_cell_is_read_or_refused(
    sound: Path, tmp_path: Path, place: tuple[str, str], value: object, row: int
) -> None:
    folder = copied(sound, tmp_path / "copy")
    try:
        forge.put(folder / LEDGER, *place, value, row=row)
    except sqlite3.IntegrityError:  # SQLite itself would not have it: two rows of one number, no number where one is the key
        return
    read_all(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_any_bytes_changed_in_the_file_are_read_or_refused(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = copied(sound, tmp_path / "copy")
    content = bytearray((folder / LEDGER).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 6000), st.integers(0, len(content) - 1)))  # the schema is in the first pages
        content[at] ^= data.draw(st.integers(1, 255))
    (folder / LEDGER).write_bytes(content)
    read_all(folder)


def test_a_high_bit_in_the_schema_is_a_damaged_ledger(sound: Path, tmp_path: Path) -> None:
    content = (sound / LEDGER).read_bytes()
    for word in (b"CREATE TABLE rounds", b"rounds", b"snapshot", b"client TEXT", b"STRICT"):
        folder = copied(sound, tmp_path / "copy")
        at = content.index(word)
        (folder / LEDGER).write_bytes(content[:at] + bytes([content[at] | 0x80]) + content[at + 1 :])
        assert any(isinstance(error, DamagedLedgerError) for error in read_all(folder)), word


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW v AS SELECT * FROM rounds",
        "CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM rounds; END",
        "CREATE TABLE more (x, y GENERATED ALWAYS AS (x + 1))",
        "CREATE INDEX i ON rounds (abs(number))",
        "DROP TABLE pools",
    ],
)
def test_other_tables_views_and_triggers_are_refused_before_a_row_is_read(statement: str, sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "copy")
    raw = sqlite3.connect(folder / LEDGER)
    raw.execute(statement)
    raw.commit()
    raw.close()
    for writing in (False, True):
        with pytest.raises(DamagedLedgerError, match="does not have the tables"):
            Ledger.open(folder, writing=writing)


def test_rounds_that_lead_in_a_circle_end(sound: Path, tmp_path: Path) -> None:
    """The pages of a table are its own children: rows without end, for whoever only counts or skips them."""
    folder = copied(sound, tmp_path / "copy")
    forge.change(folder / LEDGER, lambda raw: raw.executemany(
        "INSERT INTO events VALUES (?, 1, 'made up', '{}', 0.5, x'', x'')", [(number,) for number in range(100, 3000)]
    ))  # fmt: skip
    content = bytearray((folder / LEDGER).read_bytes())
    raw = sqlite3.connect(folder / LEDGER)
    root, size = raw.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events'").fetchone()[0], 2048
    raw.close()
    start = (root - 1) * size
    assert content[start] == 5, "the root is not an inner page"
    cells = int.from_bytes(content[start + 3 : start + 5], "big")
    for number in range(cells):
        at = start + int.from_bytes(content[start + 12 + 2 * number : start + 14 + 2 * number], "big")
        content[at : at + 4] = root.to_bytes(4, "big")
    content[start + 8 : start + 12] = root.to_bytes(4, "big")
    (folder / LEDGER).write_bytes(content)
    assert read_all(folder)


@pytest.mark.parametrize("round", [2**62, 10**6 + 1, -1])
def test_a_round_number_without_end_is_no_loop(round: int, folder: Path, told: Told) -> None:
    forge.put(folder / LEDGER, "rounds", "number", round, row=2)
    for command in (("report",), ("ledger", "show"), ("ledger", "verify"), ("status",)):
        told(*command, folder)
    assert "is not as it was written, from round" in told("simulate", "--resume", folder, "--quiet")


def test_a_model_of_2_to_the_40_parameters_is_not_made(sound: Path, tmp_path: Path) -> None:
    """The header speaks of a state of terabytes; the snapshot has a few kilobytes."""
    from fedtune.chain import as_text
    from fedtune.config import RunConfig
    from fedtune.layout import Layout

    shapes = [["a", [2**20, 2**19]]]
    used = RunConfig(algorithm="fedavg").as_mapping()
    layout = Layout.from_shapes([("a", (2**20, 2**19))], "one")
    pool = Rules(RunConfig(algorithm="fedavg"), layout, b"").algorithm.pool(RunConfig(algorithm="fedavg"), layout, 0)
    folder = copied(sound, tmp_path / "copy")
    values = (as_text(shapes), as_text(used), layout.digest, pool.identity)
    forge.change(
        folder / LEDGER, lambda raw: raw.execute("UPDATE header SET shapes = ?, used = ?, layout = ?, pool = ?", values)
    )
    with Ledger.open(folder) as ledger, pytest.raises(DamagedLedgerError, match="has no room for the 549,755,813,888"):
        verify(ledger)
    with Ledger.open(folder) as ledger, pytest.raises(DamagedLedgerError, match="has no room for"):
        restore(ledger, Rules.of(ledger.header))


def test_a_text_that_is_not_utf_8_names_its_cell(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "copy")
    content = (folder / LEDGER).read_bytes()
    at = content.index(b'{"aggregate":')  # seconds of a round
    (folder / LEDGER).write_bytes(content[: at + 2] + b"\xff" + content[at + 3 :])
    named = r"column (cpu_)?seconds of round \d \(table rounds\) is no text in UTF-8"
    with Ledger.open(folder) as ledger, pytest.raises(DamagedLedgerError, match=named):
        list(ledger.rounds())
