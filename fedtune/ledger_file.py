"""The SQLite file of a ledger: its tables, how it is opened and locked, and what its errors mean to a reader."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune import shortage
from fedtune.errors import DamagedLedgerError, ForeignLedgerError, FullLedgerError, LedgerError, LockedLedgerError
from fedtune.only_one import OnlyOne
from fedtune.private import opener

LEDGER, LOCK = "ledger.sqlite", "ledger.lock"
APPLICATION, FORMAT = 0x46544C47, 2  # "FTLG"
BUSY_SECONDS = 10.0
PAGE = 2048  # bytes; an update of 4,096 coordinates leaves less of its last page empty than with SQLite's 4,096

SCHEMA = (
    "CREATE TABLE header (id INTEGER PRIMARY KEY CHECK (id = 1), created TEXT NOT NULL, versions TEXT NOT NULL, "
    "asked TEXT NOT NULL, used TEXT NOT NULL, fingerprint BLOB NOT NULL, layout BLOB NOT NULL, shapes TEXT NOT NULL, "
    "partition BLOB NOT NULL, pool BLOB NOT NULL, digest BLOB NOT NULL) STRICT",
    "CREATE TABLE rounds (number INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, clients TEXT NOT NULL, "
    "refused TEXT NOT NULL, train_loss REAL, traffic TEXT NOT NULL, seconds TEXT NOT NULL, cpu_seconds TEXT NOT NULL, "
    "elapsed REAL NOT NULL, "
    "state BLOB NOT NULL, used BLOB NOT NULL, previous BLOB NOT NULL, digest BLOB NOT NULL) STRICT",
    "CREATE TABLE updates (round INTEGER NOT NULL, client TEXT NOT NULL, share REAL NOT NULL, payload BLOB NOT NULL, "
    "PRIMARY KEY (round, client)) STRICT",
    "CREATE TABLE events (number INTEGER PRIMARY KEY, round INTEGER NOT NULL, kind TEXT NOT NULL, detail TEXT NOT NULL, "
    "elapsed REAL NOT NULL, previous BLOB NOT NULL, digest BLOB NOT NULL) STRICT",
    "CREATE TABLE pools (number INTEGER PRIMARY KEY, coefficients BLOB NOT NULL) STRICT",
    "CREATE TABLE snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), round INTEGER NOT NULL, moves INTEGER NOT NULL, "
    "arrays BLOB NOT NULL, rounds_head BLOB NOT NULL, events_head BLOB NOT NULL, digest BLOB NOT NULL) STRICT",
)


def lock(folder: Path) -> OnlyOne:
    """The right to write the ledger in `folder`. Raises LockedLedgerError if another process has it."""
    try:
        return OnlyOne(folder / LOCK)
    except BlockingIOError:
        raise LockedLedgerError(
            f"Another process carries on the run in '{folder}': wait for it, or stop it with `fedtune stop {folder}`."
        ) from None
    except OSError as error:
        raise LedgerError(f"'{folder / LOCK}' could not be made: {error.strerror}. Check permissions and space.") from error


def connect(path: Path, writing: bool) -> sqlite3.Connection:
    """Open an existing file. A reader works beside a writer."""
    if writing:
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA synchronous = FULL")
        return connection
    frozen = "" if os.access(path.parent, os.W_OK) else "&immutable=1"  # a reader of a write-ahead log writes its index
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro{frozen}", timeout=BUSY_SECONDS, isolation_level=None, uri=True)


def begin(path: Path) -> sqlite3.Connection:
    """A new file with empty tables."""
    open(path, "xb", opener=opener).close()  # the files beside it take their mode from it
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in (
        f"PRAGMA page_size = {PAGE}",  # before anything is written
        f"PRAGMA application_id = {APPLICATION}",
        f"PRAGMA user_version = {FORMAT}",
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        *SCHEMA,
    ):
        connection.execute(statement)
    return connection


def check_kind(path: Path, connection: sqlite3.Connection) -> None:
    """Refuse what this program did not write or cannot read."""
    application, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if application != APPLICATION:
        raise ForeignLedgerError(f"'{path}' is a database, but not a ledger of fedtune: give the folder of a run.")
    if version > FORMAT:
        raise ForeignLedgerError(
            f"'{path}' has format {version}, this program reads {FORMAT}: install a newer fedtune.", found=version, known=FORMAT
        )
    schema = {row[0] for row in connection.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}
    if schema != set(SCHEMA):
        raise DamagedLedgerError(f"'{path}' does not have the tables of format {FORMAT}: restore it.", row="the tables")


_NO_ROOM = "{}. Free some space and resume the run; every committed round is kept"

_CODES: dict[int, tuple[type[LedgerError], str]] = {
    sqlite3.SQLITE_FULL: (FullLedgerError, _NO_ROOM.format(shortage.FULL)),
    sqlite3.SQLITE_BUSY: (LockedLedgerError, "another process holds it. Close what has it open, and resume the run"),
    sqlite3.SQLITE_LOCKED: (LockedLedgerError, "another process holds it. Close what has it open, and resume the run"),
    sqlite3.SQLITE_CORRUPT: (DamagedLedgerError, "the file is damaged. Restore it from a copy"),
    sqlite3.SQLITE_NOTADB: (
        ForeignLedgerError,
        "it is not an SQLite file. Give the folder of a run, or restore it from a copy",
    ),
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of SQLite or of the system at `path` into one that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        kind, text = _CODES.get((code or 0) & 0xFF, (LedgerError, f"{error}. Check the disk and the permissions"))
        if (code or 0) & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and (short := shortage.disk_at(path)):
            kind, text = FullLedgerError, _NO_ROOM.format(short)
        if "decode to UTF-8" in str(error):
            kind, text = DamagedLedgerError, "a text in it is damaged. Restore it from a copy"
        raise kind(f"'{path}' cannot be used: {text}.", path=str(path), code=code) from error
    except OSError as error:
        short = shortage.disk(error)
        kind, text = (
            (FullLedgerError, _NO_ROOM.format(short)) if short else (LedgerError, f"{error.strerror}. Check permissions")
        )
        raise kind(f"'{path}' cannot be used: {text}.", path=str(path)) from error


def sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
