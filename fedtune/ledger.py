"""The ledger of a run: one SQLite file that is the truth about it. docs/ledger.md is the specification.

    header    one row: format, versions, settings, base model, layout, partition, first pool
    rounds    a row a round, 0 is the base model: who was asked, what was refused and why, bytes, digest of the state
    updates   the payloads that a round used, as they came over the wire, with their weights
    events    what happened between rounds: evaluations, repeats of a round, commands, resumes
    pools     coefficients of the pools that are finished
    snapshot  one row, replaced: the server's state after the last round

Payloads, pools and a snapshot that are large lie beside it (`fedtune.beside`), and their columns name them.

Header, rounds and events are hash chains (`fedtune.chain`); a round covers its updates, and the snapshot both heads. A
round and its snapshot are one transaction in a write-ahead log that is flushed before `commit_round` returns.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from fedtune.beside import REFERENCE, Beside
from fedtune.chain import Value, link
from fedtune.errors import DamagedLedgerError, LedgerError
from fedtune.ledger_cells import MOST_ROUNDS, Cells
from fedtune.ledger_file import LEDGER, Steps, begin, check_files, check_kind, connect, explained, lock, sync, to_write
from fedtune.ledger_rows import Happened, Header, Round, Snapshot, Used
from fedtune.only_one import OnlyOne
from fedtune.pieces import Buffer

__all__ = ["START", "Happened", "Header", "Ledger", "Round", "Snapshot", "Used", "updates_digest"]

START = b"\x00" * 32  # the digest before the header


class Ledger:
    """An open ledger. `Ledger.create` and `Ledger.open`; close it, or use it in a `with` block.

    Every method raises a LedgerError that says what is wrong; a failed write leaves what was committed before.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: OnlyOne | None) -> None:
        self.path, self._connection, self._lock = path, connection, lock
        self._steps = Steps(path, connection)
        self._beside = Beside(path.parent)

    @classmethod
    def create(cls, folder: Path, header: Header, snapshot: Snapshot, base: Round) -> Self:
        """Make the ledger of a new run in `folder`, with round 0; whole or not at all.

        Raises:
            LedgerError: there is one already, another process makes one, or the disk refuses.
        """
        path, held = folder / LEDGER, lock(folder)
        new = path.with_suffix(".new")
        try:
            if path.exists():
                raise LedgerError(f"'{path}' exists already: resume the run, or give another folder with --out.")
            for leftover in folder.glob(f"{new.name}*"):
                leftover.unlink()
            with explained(path):
                connection = begin(new)
                building = cls(new, connection, None)
                building._write_header(header)
                building.commit_round(base, (), (), snapshot)
                connection.close()
                new.replace(path)
                sync(folder)
        finally:
            held.release()
        return cls.open(folder, writing=True)

    @classmethod
    def open(cls, folder: Path, *, writing: bool = False) -> Self:
        """Open the ledger in `folder`: to read it, also while its run goes on, or to carry the run on.

        Raises:
            LedgerError: there is none, or (writing) another process has it. ForeignLedgerError, DamagedLedgerError.
        """
        path = folder / LEDGER
        check_files(path, writing)
        held = lock(folder) if writing else None
        try:
            with explained(path):
                connection = connect(path, writing)
                with contextlib.ExitStack() as stack:
                    stack.callback(connection.close)
                    check_kind(path, connection)
                    if writing:
                        to_write(connection)
                    stack.pop_all()
        except BaseException:
            if held:
                held.release()
            raise
        return cls(path, connection, held)

    def close(self) -> None:
        """Close the file and let others write; again is fine."""
        self._connection.close()
        if self._lock:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ reading

    @property
    def header(self) -> Header:
        """What the run is."""
        return Header.of(self._whole("header"))

    @property
    def last(self) -> int:
        """Number of the last round that is committed."""
        found = self._one("SELECT max(number) AS number FROM rounds")
        return Cells(self.path, "rounds", "the last round", found).whole("number", most=MOST_ROUNDS)

    def round(self, number: int) -> Round:
        """One round."""
        return self._round(self._one("SELECT * FROM rounds WHERE number = ?", number))

    def rounds(self) -> Iterator[Round]:
        """All rounds in order, from 0."""
        for expected, row in enumerate(self._rows("SELECT * FROM rounds ORDER BY number")):
            found = self._round(row)
            if found.number != expected:
                raise self._not_in_order("rounds", f"round {expected}")
            yield found

    def _round(self, row: Mapping[str, Any]) -> Round:
        return Round.of(Cells(self.path, "rounds", f"round {row['number']}", row))

    def updates(self, number: int) -> list[Used]:
        """The updates that round `number` used, by client id."""
        found: list[Used] = []
        for row in self._rows("SELECT client, share, payload FROM updates WHERE round = ? ORDER BY client", number):
            used = Used.of(Cells(self.path, "updates", f"an update of round {number}", row))
            if found and used.client.encode() <= found[-1].client.encode():
                raise self._not_in_order("updates", f"round {number}")
            found.append(used)
        return found

    def events(self, kind: str = "", after: int = -1) -> Iterator[Happened]:
        """All events in order, or those of one kind, or of those the ones after round `after`."""
        where, last = "WHERE ?1 IN ('', kind) AND ?2 IN (-1, round)", 0
        for row in self._rows(f"SELECT * FROM events {where} ORDER BY number", kind, after):
            event = Happened.of(Cells(self.path, "events", f"event {row['number']}", row))
            if event.number <= last:
                raise self._not_in_order("events", f"event {event.number}")
            last = event.number
            yield event

    @property
    def pool_count(self) -> int:
        """How many pools are finished."""
        found = self._one("SELECT coalesce(max(number) + 1, 0) AS number FROM pools")
        return Cells(self.path, "pools", "the last pool", found).whole("number", most=MOST_ROUNDS)

    def pools(self) -> list[bytes]:
        """Encoded coefficients of the pools that are finished, in order."""
        found: list[bytes] = []
        for row in self._rows("SELECT * FROM pools ORDER BY number"):
            cells = Cells(self.path, "pools", f"pool {row['number']}", row)
            if cells.whole("number") != len(found):
                raise self._not_in_order("pools", f"pool {len(found)}")
            found.append(bytes(self.value(cells.blob("coefficients"))))
        return found

    @property
    def snapshot(self) -> Snapshot:
        """The state after the last round."""
        return Snapshot.of(self._whole("snapshot"))

    def value(self, stored: bytes, *, hashed: bool = True) -> Buffer:
        """The value that a column holds or names (`Used.payload`, `Snapshot.arrays`); `hashed`: its digest is checked.

        Raises DamagedLedgerError.
        """
        return self._beside.value(stored, hashed=hashed)

    def rows(self, table: str) -> Iterator[tuple[Any, ...]]:
        """The raw columns of a table in the order of its key, for `fedtune.verify`: of any type that SQLite has."""
        for row in self._rows(f"SELECT * FROM {table} ORDER BY 1, 2"):
            yield tuple(row.values())

    def _not_in_order(self, table: str, row: str) -> DamagedLedgerError:
        return DamagedLedgerError(
            f"'{self.path}' is damaged: the rows of table {table} are not in order at {row}. Restore it from a copy.",
            row=row,
            table=table,
        )

    @contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """Inside the `with` block everything is read as it is now, also while the run goes on."""
        with explained(self.path):
            self._connection.execute("BEGIN")
        try:
            yield
        finally:
            with contextlib.suppress(sqlite3.Error):  # of a damaged file; what was read said so
                self._connection.execute("ROLLBACK")

    def damage(self) -> str:
        """What SQLite itself finds wrong with the file; "" for nothing."""
        found = str(self._one("PRAGMA integrity_check")["integrity_check"])
        return "" if found == "ok" else found

    # ------------------------------------------------------------------ writing

    def store(self, parts: Iterable[Buffer]) -> bytes:
        """What a column is to hold of the value of these parts, which is on the disk if it is large."""
        with explained(self.path):
            return self._beside.store(parts)

    def stored(self, value: Buffer) -> bytes:
        """`store` of one value; of one that `keep` returned at once."""
        with explained(self.path):
            return self._beside.stored(value)

    def keep(self, value: Buffer) -> Buffer:
        """`value`, out of memory if it is large; what no row names by the next commit is removed."""
        with explained(self.path):
            return self._beside.keep(value)

    def commit_round(
        self, row: Round, used: Iterable[Used], pools: Iterable[bytes], snapshot: Snapshot, *, keep_updates: bool = True
    ) -> None:
        """Write a round with its updates, the pools that it finished and the state after it; on the disk when this returns.

        Without `keep_updates` the files of large updates are removed then.
        """
        before = [self.snapshot.arrays] if row.number else []  # whoever reads it now has until the next round
        with self._transaction():
            updates = sorted(used, key=lambda update: update.client)
            for update in updates:
                self._insert("updates", (row.number, update.client, update.share, update.payload))
            columns = (*row.columns(), updates_digest(row.number, updates))
            previous = self._head("rounds")
            self._insert("rounds", (*columns, previous, link(previous, "rounds", columns)))
            for number, pool in enumerate(pools, start=self.pool_count):
                self._insert("pools", (number, pool))
            self._replace_snapshot(snapshot)
        self.sweep(before, keep_updates=keep_updates)

    def sweep(self, before: Iterable[bytes] = (), *, keep_updates: bool = True) -> None:
        """Remove the files beside the ledger that no row names, but for those of `before`; the chains were checked before.

        Without `keep_updates` those of updates too.
        """
        if not self._beside.path.exists():
            return
        kept = list(before)
        updates = [("updates", "payload")] if keep_updates else []
        for table, column in (*updates, ("pools", "coefficients"), ("snapshot", "arrays")):
            query = f"SELECT {column} AS stored FROM {table} WHERE length({column}) = ?"
            kept += [row["stored"] for row in self._rows(query, REFERENCE)]
        with explained(self.path):
            self._beside.sweep(kept)

    def commit_event(self, kind: str, detail: Mapping[str, Any], elapsed: float = 0.0) -> None:
        """Write an event after the last round; on the disk when this returns."""
        with self._transaction():
            row = self._one("SELECT coalesce(max(number), 0) + 1 AS number FROM events")
            number = Cells(self.path, "events", "the last event", row).whole("number", 1)
            columns = Happened(number, self.last, kind, detail, elapsed).columns()
            previous = self._head("events")
            self._insert("events", (*columns, previous, link(previous, "events", columns)))
            self._replace_snapshot(self.snapshot)

    def _write_header(self, header: Header) -> None:
        with self._transaction():
            columns = header.columns()
            self._insert("header", (1, *columns, link(START, "header", columns)))

    def _replace_snapshot(self, snapshot: Snapshot) -> None:
        columns = (snapshot.round, snapshot.moves, snapshot.arrays, self._head("rounds"), self._head("events"))
        self._connection.execute("DELETE FROM snapshot")
        self._insert("snapshot", (1, *columns, link(START, "snapshot", columns)))

    def _head(self, table: str) -> bytes:
        """The digest of the last row of a chain; that of the header before its first."""
        rows = self._rows(f"SELECT digest FROM {table} ORDER BY number DESC LIMIT 1")
        found = next(rows, None) or self._one("SELECT digest FROM header")
        return Cells(self.path, table, f"the end of the {table}", found).blob("digest", 32)

    def _insert(self, table: str, values: tuple[Value, ...]) -> None:
        self._connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with explained(self.path):
            self._steps.refill()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Value) -> Iterator[dict[str, Any]]:
        with explained(self.path):
            self._steps.refill()
            cursor = self._connection.execute(query, values)
            names = [column[0] for column in cursor.description]
            for row in cursor:
                yield dict(zip(names, row, strict=True))

    def _whole(self, table: str) -> Cells:
        """The one row of a table that has one, whose digest must be that of its columns."""
        rows = list(itertools.islice(self._rows(f"SELECT * FROM {table}"), 2))
        values = tuple(rows[0].values()) if rows else ()
        if len(rows) != 1 or link(START, table, values[1:-1]) != values[-1]:
            raise DamagedLedgerError(
                f"The {table} of '{self.path}' is damaged: restore the file from a copy.", row=f"the {table}"
            )
        return Cells(self.path, table, f"the {table}", rows[0])

    def _one(self, query: str, *values: Value) -> dict[str, Any]:
        row = next(self._rows(query, *values), None)
        if row is None:
            raise DamagedLedgerError(f"'{self.path}' lacks a row ({query}): restore it from a copy.", row=query)
        return row


def updates_digest(round: int, updates: Iterable[Used]) -> bytes:
    """32 bytes over the updates of a round, in the order of their client ids."""
    return link(START, "updates", [round, *(value for u in updates for value in (u.client, u.share, u.payload))])
