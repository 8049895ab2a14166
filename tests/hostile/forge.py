"""Ledgers with anything in any cell and all digests right: what somebody who knows the format can make."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from fedtune.chain import link
from fedtune.ledger_file import SCHEMA

START = b"\0" * 32


def columns() -> list[tuple[str, str]]:
    """(table, column) of every column of a ledger."""
    with sqlite3.connect(":memory:") as memory:
        for statement in SCHEMA:
            memory.execute(statement)
        tables = [row[0] for row in memory.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return [(table, row[1]) for table in tables for row in memory.execute(f"PRAGMA table_info({table})")]


def put(path: Path, table: str, column: str, value: object, *, row: int = 0) -> None:
    """Write `value` into a cell, whatever its type, and make every digest right again."""
    where = f"rowid = (SELECT rowid FROM {table} ORDER BY rowid LIMIT 1 OFFSET ?)"
    change(path, lambda raw: raw.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (value, row)))


def change(path: Path, act: Callable[[sqlite3.Connection], object]) -> None:
    """Do anything to the tables, and make every digest right again."""
    with_schema(path, lambda sql: sql.replace(" STRICT", "").replace(" NOT NULL", "").replace(" CHECK (id = 1)", ""))
    raw = sqlite3.connect(path, isolation_level=None)
    raw.execute("PRAGMA synchronous = OFF")
    raw.execute("BEGIN")
    act(raw)
    chain(raw)
    raw.execute("COMMIT")
    raw.close()
    whole = dict(zip((statement.split(" ")[2] for statement in SCHEMA), SCHEMA, strict=True))
    with_schema(path, lambda sql: whole[sql.split(" ")[2]])


def with_schema(path: Path, edit: Callable[[str], str]) -> None:
    """Edit the text of every table in place."""
    raw = sqlite3.connect(path, isolation_level=None)
    raw.execute("PRAGMA synchronous = OFF")
    raw.execute("PRAGMA writable_schema = ON")
    for rowid, sql in raw.execute("SELECT rowid, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall():
        raw.execute("UPDATE sqlite_schema SET sql = ? WHERE rowid = ?", (edit(sql), rowid))
    version = raw.execute("PRAGMA schema_version").fetchone()[0]
    raw.execute(f"PRAGMA schema_version = {version + 1}")
    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    raw.close()


def chain(raw: sqlite3.Connection) -> None:
    """Recompute the digests of header, rounds, events and snapshot."""
    for row in raw.execute("SELECT * FROM header").fetchall():
        raw.execute("UPDATE header SET digest = ?", (link(START, "header", row[1:-1]),))
    first = raw.execute("SELECT digest FROM header").fetchone()
    heads = {table: first[0] if first else START for table in ("rounds", "events")}
    for table in ("rounds", "events"):
        for rowid, *row in raw.execute(f"SELECT rowid, * FROM {table} ORDER BY number").fetchall():
            if table == "rounds":
                used = raw.execute("SELECT client, share, payload FROM updates WHERE round = ? ORDER BY client", (row[0],))
                row[-3] = link(START, "updates", [row[0], *(value for update in used.fetchall() for value in update)])
                raw.execute("UPDATE rounds SET used = ? WHERE rowid = ?", (row[-3], rowid))
            digest = link(heads[table], table, row[:-2])
            raw.execute(f"UPDATE {table} SET previous = ?, digest = ? WHERE rowid = ?", (heads[table], digest, rowid))
            heads[table] = digest
    for found in raw.execute("SELECT * FROM snapshot").fetchall():
        columns = (*found[1:4], heads["rounds"], heads["events"])
        digest = link(START, "snapshot", columns)
        raw.execute("UPDATE snapshot SET rounds_head = ?, events_head = ?, digest = ?", (*columns[3:], digest))
