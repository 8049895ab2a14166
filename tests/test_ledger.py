"""The ledger: what is committed is there, what is damaged is found, what is foreign, locked or full says so."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedtune import ledger_file, wire
from fedtune.algorithms.base import shares
from fedtune.bits import round_scalars
from fedtune.chain import canonical, link
from fedtune.config import RunConfig
from fedtune.errors import (
    DamagedLedgerError,
    ForeignLedgerError,
    FullLedgerError,
    LedgerError,
    LockedLedgerError,
)
from fedtune.layout import Layout
from fedtune.ledger import Header, Ledger, Round, Used
from fedtune.ledger_file import FORMAT, LEDGER, PAGE
from fedtune.replay import Rules, read_update, restore, snapshot_of
from fedtune.seeds import Stream
from fedtune.traffic import Traffic
from fedtune.verify import verify
from fedtune.wire import Status, Update
from tests.foreign_texts import TEXTS, acting

SHAPES = (("a", (300, 40)), ("b", (40,)), ("c", (500, 30)))
FRESH = RunConfig(algorithm="fedkseed-pro", K=64, local_steps=6, pool_every=2, clients_per_round=2)


def begin(folder: Path, config: RunConfig = FRESH) -> tuple[Ledger, Rules]:
    """A new ledger without a model: the layout is made up."""
    from fedtune.algorithms import ALGORITHMS

    layout = Layout.from_shapes(SHAPES, ALGORITHMS[config.algorithm].block_rule(config))
    rules = Rules(config, layout, b"f" * 16)
    state = rules.start()
    header = Header(
        "2026-01-01T00:00:00+00:00",
        {"fedtune": "0"},
        {},
        config.as_mapping(),
        rules.fingerprint,
        layout.digest,
        SHAPES,
        b"p" * 32,
        state.pool.identity,
    )
    folder.mkdir(exist_ok=True)
    return Ledger.create(folder, header, snapshot_of(state, 0), Round(0, state=rules.digest(state))), rules


def go_on(ledger: Ledger, rules: Rules, rounds: int, clients: int = 2, most: int = 0) -> None:
    """Commit `rounds` more rounds of made-up updates."""
    config, state = rules.config, restore(ledger, rules)
    for number in range(ledger.last + 1, ledger.last + 1 + rounds):
        state = rules.begin_round(state)
        digest = rules.digest(state)
        payloads = {
            str(client): wire.encode_update(
                update_of(rules, number, client, digest, most), config.scalar_bits, client=str(client)
            )
            for client in range(clients)
        }
        asked = {"round": number, "digest": digest}
        read = {client: read_update(rules, state, data, client=client, **asked) for client, data in payloads.items()}
        state = rules.aggregate(state, read)
        weights = shares(read, config)
        asked = (*payloads, "late")
        ledger.commit_round(
            Round(
                number,
                1,
                asked,
                {"late": "no answer"},
                1.5,
                {"0": Traffic(10, 20, 110, 120, 2, 3)},
                {"clients": 0.5},
                {"clients": 0.4},
                1.0 * number,
                rules.digest(state),
            ),
            [Used(client, weights[client], data) for client, data in payloads.items()],
            rules.closed(state)[len(ledger.pools()) :],
            snapshot_of(state, number),
        )
        ledger.commit_event("evaluation", {"round": number, "eval_loss": 2.0 - 0.1 * number}, 1.0 * number)


def update_of(rules: Rules, number: int, client: int, digest: bytes, most: int) -> Update:
    stream = Stream(7, "made up", number, client)
    counts = np.zeros(0, dtype=np.int64)
    size = rules.config.local_steps * rules.config.directions_per_step
    if rules.algorithm.kind == wire.Kind.COORDINATES:
        counts = np.zeros(rules.layout.blocks, dtype=np.int64)
        counts[:] = most // rules.layout.blocks
        size = int(counts.sum())
    scalars = stream.normal(size).astype(np.float32)
    steps = rules.config.local_steps
    return Update(number, digest, Status.FINISHED, steps, 10 + client, 1.5, round_scalars(scalars, 16), counts)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Ledger, Rules]]:
    ledger, rules = begin(tmp_path / "run")
    go_on(ledger, rules, 5)
    yield ledger, rules
    ledger.close()


# ---------------------------------------------------------------------------------------------------- what is written is read


def test_a_ledger_is_read_as_it_was_written(run: tuple[Ledger, Rules]) -> None:
    ledger, rules = run
    assert (ledger.last, len(ledger.pools())) == (5, 2)
    assert Rules.of(ledger.header) == rules
    row = ledger.round(3)
    assert (row.clients, row.refused, row.total.serialised_down, row.seconds, row.cpu_seconds) == (
        ("0", "1", "late"),
        {"late": "no answer"},
        120,
        {"clients": 0.5},
        {"clients": 0.4},
    )
    assert [update.client for update in ledger.updates(3)] == ["0", "1"]
    assert sum(update.share for update in ledger.updates(3)) == pytest.approx(1.0)
    assert [event.detail["round"] for event in ledger.events("evaluation")] == [1, 2, 3, 4, 5]
    assert [event.kind for event in ledger.events("nothing")] == []


def test_a_strangers_text_is_kept_and_harmless_in_the_file(run: tuple[Ledger, Rules]) -> None:
    ledger, _ = run
    detail = {text: text for text in TEXTS}
    ledger.commit_event("said", detail | {"half": "half \ud83d a character", "whole": "\U0001f600"})
    assert next(ledger.events("said")).detail == detail | {"half": "half \ufffd a character", "whole": "\U0001f600"}
    stored = next(row for row in ledger.rows("events") if row[2] == "said")[3]
    assert not list(acting(stored, ""))


def test_the_snapshot_is_what_the_updates_lead_to(run: tuple[Ledger, Rules]) -> None:
    ledger, rules = run
    found = verify(ledger)
    assert (found.rounds, found.updates, found.events, found.pools) == (5, 10, 5, 2)
    assert found.digest == rules.digest(restore(ledger, rules)).hex()


def test_a_reader_sees_the_run_while_it_is_written(run: tuple[Ledger, Rules]) -> None:
    ledger, rules = run
    with Ledger.open(ledger.path.parent) as reader:
        with reader.at_one_moment():
            before = reader.last
            go_on(ledger, rules, 1)
            assert reader.last == before == 5
        assert reader.last == 6


def test_a_ledger_on_a_disk_that_cannot_be_written_is_read(run: tuple[Ledger, Rules], monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, _ = run
    ledger.close()
    monkeypatch.setattr("fedtune.ledger_file.os.access", lambda path, mode: False)
    with Ledger.open(ledger.path.parent) as reader:
        assert verify(reader).rounds == 5
    assert sorted(path.name for path in ledger.path.parent.iterdir()) == ["ledger.lock", LEDGER]


def test_canonical_bytes_and_a_link_known_by_heart() -> None:
    """Known answers: the digests of docs/ledger.md do not change by accident."""
    assert canonical([1, "é", b"x", None, 0.5]) == b"I1;S2;\xc3\xa9B1;xNF\x00\x00\x00\x00\x00\x00\xe0?"
    assert link(b"\0" * 32, "rounds", [1, "a"]).hex() == KNOWN
    assert len({canonical(values) for values in (["ab", "c"], ["a", "bc"], ["abc"], [b"ab", "c"], ["ab", None, "c"])}) == 5


KNOWN = "518dd295ffffab42ae0ad06f311626a3cc207fafbfaee30cca581de585d325ee"


# ---------------------------------------------------------------------------------------------------- damage


def columns() -> list[tuple[str, str]]:
    from fedtune.ledger_file import SCHEMA

    with sqlite3.connect(":memory:") as memory:
        for statement in SCHEMA:
            memory.execute(statement)
        tables = [row[0] for row in memory.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return [(table, row[1]) for table in tables for row in memory.execute(f"PRAGMA table_info({table})") if row[1] != "id"]


@pytest.mark.parametrize(("table", "column"), columns())
def test_verify_finds_a_flipped_byte_in_any_column(table: str, column: str, run: tuple[Ledger, Rules]) -> None:
    ledger, _ = run
    path = ledger.path
    ledger.close()
    with sqlite3.connect(path) as raw:
        row = raw.execute(f"SELECT rowid, {column} FROM {table} ORDER BY rowid LIMIT 1 OFFSET ?", (_middle(table),)).fetchone()
        raw.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (_flipped(row[1]), row[0]))
    raw.close()
    with Ledger.open(path.parent) as damaged, pytest.raises(DamagedLedgerError, match="is not as it was written") as found:
        verify(damaged)
    singular = {"rounds": "round", "updates": "", "events": "event", "pools": "pool"}.get(table, table)
    assert singular in str(found.value.facts["row"]) or column in ("round", "number")


def _middle(table: str) -> int:
    return {"header": 0, "snapshot": 0, "pools": 1, "updates": 4}.get(table, 2)


def _flipped(value: object) -> object:
    if isinstance(value, int | float):
        return value + 1000
    if isinstance(value, str):
        return value[:-1] + chr(ord(value[-1]) ^ 2)
    assert isinstance(value, bytes)
    return value[:-1] + bytes([value[-1] ^ 1])


@pytest.mark.parametrize(
    ("statement", "row"),
    [
        ("DELETE FROM rounds WHERE number = 3", "round 3"),
        ("DELETE FROM rounds WHERE number = 5", "the updates"),
        ("DELETE FROM updates WHERE round = 2 AND client = '1'", "round 2"),
        ("DELETE FROM events WHERE number = 5", "the end of the events"),
        ("DELETE FROM pools WHERE number = 1", "the pools"),
        ("DELETE FROM snapshot", "the snapshot"),
        ("DELETE FROM header", "the header"),
        ("INSERT INTO updates VALUES (9, 'x', 1.0, x'00')", "the updates"),
        ("INSERT INTO events SELECT 6, round, kind, detail, elapsed, previous, digest FROM events WHERE number = 5", "event 6"),
    ],
)
def test_verify_finds_missing_and_added_rows(statement: str, row: str, run: tuple[Ledger, Rules]) -> None:
    ledger, _ = run
    ledger.close()
    with sqlite3.connect(ledger.path) as raw:
        raw.execute(statement)
    raw.close()
    with Ledger.open(ledger.path.parent) as damaged, pytest.raises(DamagedLedgerError) as found:
        verify(damaged)
    assert found.value.facts["row"] == row


GAPS: dict[str, tuple[str, str, Callable[[Ledger], object]]] = {  # what is done to a table, the row that is named, who reads
    "rounds": ("DELETE FROM rounds WHERE number = 1", "round 1", lambda ledger: list(ledger.rounds())),
    "pools": ("UPDATE pools SET number = number + 7", "pool 0", Ledger.pools),
}
CELLS: dict[str, tuple[str, str, Callable[[Ledger], object]]] = {
    "rounds": ("UPDATE rounds SET attempt = -1 WHERE number = 1", "round 1", lambda ledger: ledger.round(1)),
    "updates": ("UPDATE updates SET share = 9e999 WHERE round = 2", "an update of round 2", lambda ledger: ledger.updates(2)),
    "events": ("UPDATE events SET detail = '[]' WHERE number = 1", "event 1", lambda ledger: list(ledger.events())),
}


@pytest.mark.parametrize("kind", ["gap", "cell"])
def test_what_is_damaged_is_named_by_file_table_and_row(kind: str, run: tuple[Ledger, Rules]) -> None:
    ledger, rules = run
    go_on(ledger, rules, 3)
    ledger.commit_event("drop", {"client": "7"})
    for table, (statement, row, read) in (GAPS if kind == "gap" else CELLS).items():
        copy = ledger.path.parent / f"{kind}-{table}"
        copy.mkdir()
        with contextlib.closing(sqlite3.connect(copy / LEDGER)) as other:
            with contextlib.closing(sqlite3.connect(ledger.path)) as sound:
                sound.backup(other)
            other.execute("PRAGMA ignore_check_constraints = ON")
            assert other.execute(statement).rowcount
            other.commit()
        with Ledger.open(copy) as damaged, pytest.raises(DamagedLedgerError) as found:
            read(damaged)
        assert (found.value.facts["table"], found.value.facts["row"]) == (table, row)
        assert str(copy / LEDGER) in str(found.value)
        assert table in str(found.value)
        assert row in str(found.value)


def test_a_transaction_that_fails_is_taken_back_and_the_next_one_works(run: tuple[Ledger, Rules]) -> None:
    ledger, rules = run
    go_on(ledger, rules, 1)
    with pytest.raises(TypeError):
        ledger.commit_event("drop", {"client": object()})
    ledger.commit_event("drop", {"client": "3"})
    assert [event.detail for event in ledger.events("drop")] == [{"client": "3"}]
    verify(ledger)


def test_verify_replays_even_a_chain_that_was_forged_with_care(run: tuple[Ledger, Rules]) -> None:
    """Somebody who recomputes every digest still cannot make the updates lead to another model."""
    ledger, _ = run
    ledger.close()
    with sqlite3.connect(ledger.path) as raw:
        raw.execute("UPDATE rounds SET state = x'00112233445566778899aabbccddeeff' WHERE number = 4")
        _forge(raw)
    raw.close()
    with Ledger.open(ledger.path.parent) as damaged, pytest.raises(DamagedLedgerError, match="lead to another digest") as found:
        verify(damaged)
    assert found.value.facts["row"] == "round 4"


def _forge(raw: sqlite3.Connection) -> None:
    """Recompute the chain of the rounds and the snapshot's digest."""
    head = raw.execute("SELECT digest FROM header").fetchone()[0]
    for row in raw.execute("SELECT * FROM rounds ORDER BY number").fetchall():
        digest = link(head, "rounds", row[:-2])
        raw.execute("UPDATE rounds SET previous = ?, digest = ? WHERE number = ?", (head, digest, row[0]))
        head = digest
    row = list(raw.execute("SELECT * FROM snapshot").fetchone())
    row[4] = head
    raw.execute("UPDATE snapshot SET rounds_head = ?, digest = ?", (head, link(b"\0" * 32, "snapshot", row[1:-1])))


def test_every_byte_of_the_file_that_holds_something_is_covered(run: tuple[Ledger, Rules], tmp_path: Path) -> None:
    """Flip one byte in each 97: what the file says is then refused, or unchanged (free space)."""
    ledger, _ = run
    ledger.close()
    whole = ledger.path.read_bytes()
    copy = tmp_path / "copy"
    copy.mkdir()
    found = 0
    for at in range(0, len(whole), 97):
        (copy / LEDGER).write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            with Ledger.open(copy) as ledger:
                assert verify(ledger).rounds == 5
        except LedgerError:
            found += 1
        for extra in copy.glob(f"{LEDGER}-*"):
            extra.unlink()
    assert found > 60


# ---------------------------------------------------------------------------------------------------- not ours, not now


def test_no_ledger_no_sqlite_another_database_and_a_newer_format(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"has no ledger\.sqlite"):
        Ledger.open(tmp_path)
    (tmp_path / LEDGER).write_bytes(b"not a database at all, and longer than a header" * 100)
    with pytest.raises(ForeignLedgerError, match="not an SQLite file"):
        Ledger.open(tmp_path)
    (tmp_path / LEDGER).unlink()
    with sqlite3.connect(tmp_path / LEDGER) as other:
        other.execute("CREATE TABLE x (y)")
    other.close()
    with pytest.raises(ForeignLedgerError, match="but not a ledger of fedtune"):
        Ledger.open(tmp_path)
    ledger, _ = begin(tmp_path / "new")
    ledger.close()
    with sqlite3.connect(ledger.path) as newer:
        newer.execute(f"PRAGMA user_version = {FORMAT + 1}")
    newer.close()
    with pytest.raises(ForeignLedgerError, match=f"has format {FORMAT + 1}, this program reads {FORMAT}: install a newer"):
        Ledger.open(tmp_path / "new")


def test_a_ledger_of_an_older_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    ledger, _ = begin(tmp_path / "old")
    ledger.close()
    with sqlite3.connect(ledger.path) as older:
        older.execute("PRAGMA user_version = 2")
    older.close()
    with pytest.raises(ForeignLedgerError, match=r"has format 2, of an older fedtune; this program reads 3: use the fedtune"):
        Ledger.open(tmp_path / "old")


def test_a_second_ledger_in_a_folder_is_refused(run: tuple[Ledger, Rules]) -> None:
    run[0].close()
    with pytest.raises(LedgerError, match="exists already"):
        begin(run[0].path.parent)


def test_two_writers_are_refused_and_a_dead_one_is_not_waited_for(run: tuple[Ledger, Rules]) -> None:
    ledger, _ = run
    with pytest.raises(LockedLedgerError, match="Another process carries on the run"):
        Ledger.open(ledger.path.parent, writing=True)
    ledger.close()
    holder = "import sys, time; from pathlib import Path; from fedtune.ledger import Ledger; "
    holder += "l = Ledger.open(Path(sys.argv[1]), writing=True); print('mine', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(ledger.path.parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == "mine\n"
        with pytest.raises(LockedLedgerError):
            Ledger.open(ledger.path.parent, writing=True)
        process.kill()
        process.wait()
    with Ledger.open(ledger.path.parent, writing=True) as mine:
        assert mine.last == 5


def test_a_database_that_something_else_holds_is_named(run: tuple[Ledger, Rules], monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, _ = run
    ledger._connection.execute("PRAGMA busy_timeout = 1")
    with sqlite3.connect(ledger.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LockedLedgerError, match="another process holds it"):
            ledger.commit_event("drop", {"client": "1"})
        other.execute("ROLLBACK")
    other.close()
    ledger.commit_event("drop", {"client": "1"})


# ---------------------------------------------------------------------------------------------------- a full disk


def test_a_full_disk_is_named_and_keeps_what_is_committed(run: tuple[Ledger, Rules]) -> None:
    ledger, rules = run
    pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
    ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(FullLedgerError, match=r"the disk is full\. Free some space and resume the run"):
        go_on(ledger, rules, 50)
    kept = ledger.last
    ledger.close()
    with Ledger.open(ledger.path.parent, writing=True) as again:
        assert verify(again).rounds == kept
        go_on(again, rules, 3)
        assert verify(again).rounds == kept + 3


# ---------------------------------------------------------------------------------------------------- torn checkpoints


def test_a_checkpoint_that_was_torn_anywhere_loses_nothing(run: tuple[Ledger, Rules], tmp_path: Path) -> None:
    """The log is copied into the file page by page: every mixture of old and new pages, with the whole log beside it."""
    ledger, _ = run
    log = Path(f"{ledger.path}-wal")
    old, frames = ledger.path.read_bytes(), log.read_bytes()
    ledger.close()
    new = ledger.path.read_bytes()
    assert len(frames) > 10 * PAGE
    for done in range(0, len(new) + 1, PAGE // 2):
        folder = tmp_path / "torn"
        folder.mkdir()
        (folder / LEDGER).write_bytes(new[:done] + old[done:])
        (folder / f"{LEDGER}-wal").write_bytes(frames)
        with Ledger.open(folder, writing=True) as found:
            assert verify(found).rounds == 5
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("config", "clients", "most"),
    [
        (RunConfig(algorithm="fedkseed", K=4096, local_steps=200), 10, 0),
        (RunConfig(algorithm="fedkseed-pro", K=4096, local_steps=200, pool_every=1), 10, 0),
        (RunConfig(algorithm="ferret", K=4096, pool_size=4096, blocks="one", pool_every=1), 5, 4096),
        (RunConfig(algorithm="ferret", K=4096, pool_size=4096, blocks="one", pool_every=1, scalar_bits=8), 10, 4096),
    ],
    ids=["fedkseed", "fedkseed-pro-fresh", "ferret", "ferret-8-bits"],
)
def test_a_round_adds_less_than_64_kilobytes_at_4096_seeds(config: RunConfig, clients: int, most: int, tmp_path: Path) -> None:
    ledger, rules = begin(tmp_path / "run", config)
    go_on(ledger, rules, 2, clients, most)
    sizes = []
    for _ in range(3):
        ledger.close()
        sizes.append(sum(path.stat().st_size for path in ledger.path.parent.iterdir()))
        ledger = Ledger.open(ledger.path.parent, writing=True)
        go_on(ledger, rules, 10, clients, most)
    ledger.close()
    grown = max((after - before) / 10 for before, after in itertools.pairwise(sizes))
    print(f"{grown:.0f} bytes a round")
    assert grown < 64_000


def test_each_transaction_is_flushed_to_the_disk(tmp_path: Path) -> None:
    """Outside the tests, which wait for no disk (tests/conftest.py); here a copy of the module that they have not changed."""
    spec = importlib.util.spec_from_file_location("as_it_is", ledger_file.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with contextlib.closing(fresh.begin(tmp_path / LEDGER)) as made:
        assert made.execute("PRAGMA synchronous").fetchone() == (2,)
    with contextlib.closing(fresh.connect(tmp_path / LEDGER, True)) as again:
        again.execute("PRAGMA synchronous = OFF")
        fresh.to_write(again)
        assert again.execute("PRAGMA synchronous").fetchone() == (2,)
