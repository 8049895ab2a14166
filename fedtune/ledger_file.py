"""The SQLite file of a ledger: its tables, how it is opened and locked, and what its errors mean to a reader.

Anybody may have made the file. Before a row of it is read it must be a regular file with our tables and nothing else (no
view, trigger, generated column); then no statement takes more steps than the file has room for rows, so that reading ends
also where its pages lead in circles.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune import shortage
from fedtune.errors import DamagedLedgerError, ForeignLedgerError, FullLedgerError, LedgerError, LockedLedgerError
from fedtune.foreign import for_screen
from fedtune.ledger_cells import text_of
from fedtune.only_one import OnlyOne
from fedtune.private import opener
from fedtune.regular import check_regular

LEDGER, LOCK = "ledger.sqlite", "ledger.lock"
APPLICATION, FORMAT = 0x46544C47, 3  # "FTLG"
FLUSHED = "PRAGMA synchronous = FULL"  # each transaction, so that a power cut takes none that was committed
BUSY_SECONDS = 10.0
PATIENCE = 0.5  # seconds that a writer waits for the lock: somebody may just be asking whether it is held
LARGEST_PAGE = 4096  # of any ledger so far: a page takes its room on the disk, so a small disk holds no large cell
LARGEST_CELL = 1_000_000_000  # bytes: SQLite's own limit
STEPS = 10_000  # of SQLite's machine between two looks at what a statement has taken
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
        return OnlyOne(folder / LOCK, PATIENCE)
    except BlockingIOError:
        raise LockedLedgerError(
            f"Another process carries on the run in '{folder}': wait for it, or stop it with `fedtune stop {folder}`."
        ) from None
    except OSError as error:
        raise LedgerError(f"'{folder / LOCK}' could not be made: {error.strerror}. Check permissions and space.") from error


def check_files(path: Path, writing: bool) -> None:
    """Refuse a ledger that is no file, and what SQLite would follow or roll back beside it.

    Raises:
        LedgerError: there is none. DamagedLedgerError: something is there that fedtune never leaves.
    """
    if not os.path.lexists(path):
        raise LedgerError(f"'{path.parent}' has no {LEDGER}: it is not the folder of a run, or of one older than ledgers.")
    if os.path.lexists(f"{path}-journal"):
        raise _not_ours(Path(f"{path}-journal"), "a ledger has a write-ahead log, and no rollback journal")
    for place in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        try:
            reads_through_link = place == path and not writing
            check_regular(place.stat() if reads_through_link else place.lstat(), place)
        except FileNotFoundError:
            if place == path:
                raise _not_ours(path, "it is a link to nothing") from None
        except OSError as error:
            raise _not_ours(place, error.strerror or type(error).__name__) from None


def _not_ours(path: Path, why: str) -> DamagedLedgerError:
    return DamagedLedgerError(f"'{path}' cannot be used: {why}. Restore the folder from a copy.", row="the file")


def connect(path: Path, writing: bool) -> sqlite3.Connection:
    """Open an existing file to read it; `to_write` then lets one write. A reader works beside a writer."""
    if writing:
        return _guarded(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None))
    frozen = "" if os.access(path.parent, os.W_OK) else "&immutable=1"  # a reader of a write-ahead log writes its index
    uri = f"{path.resolve().as_uri()}?mode=ro{frozen}"
    connection = _guarded(sqlite3.connect(uri, timeout=BUSY_SECONDS, isolation_level=None, uri=True))
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(LARGEST_CELL, max(1 << 20, _size(path))))
    return connection


def to_write(connection: sqlite3.Connection) -> None:
    """Let a connection whose file is known to be a ledger write it, each transaction flushed to the disk."""
    connection.execute("PRAGMA journal_mode = WAL").fetchone()
    connection.execute(FLUSHED)


def _guarded(connection: sqlite3.Connection) -> sqlite3.Connection:
    """The connection with what SQLite offers against files that were made to harm."""
    connection.text_factory = text_of
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.setlimit(sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 1)
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_TRIGGER, False)
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_VIEW, False)
    for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
        connection.execute(f"PRAGMA {pragma}").fetchone()
    return connection


class Steps:
    """Bounds what a statement takes: a sound one takes a few steps for each byte of the file at most."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path, self._left = path, 0
        self.refill()
        connection.set_progress_handler(self._taken, STEPS)

    def refill(self) -> None:
        """A statement begins."""
        self._left = (1_000_000 + 8 * _size(self._path)) // STEPS

    def _taken(self) -> bool:
        self._left -= 1
        return self._left < 0


def _size(path: Path) -> int:
    """Bytes of the file and its write-ahead log."""
    return sum(os.path.getsize(place) for place in (path, f"{path}-wal") if os.path.exists(place))


def begin(path: Path) -> sqlite3.Connection:
    """A new file with empty tables."""
    open(path, "xb", opener=opener).close()  # the files beside it take their mode from it
    connection = _guarded(sqlite3.connect(path, isolation_level=None))
    for statement in (
        f"PRAGMA page_size = {PAGE}",  # before anything is written
        f"PRAGMA application_id = {APPLICATION}",
        f"PRAGMA user_version = {FORMAT}",
        "PRAGMA journal_mode = WAL",
        FLUSHED,
        *SCHEMA,
    ):
        connection.execute(statement)
    return connection


def check_kind(path: Path, connection: sqlite3.Connection) -> None:
    """Refuse what this program did not write or cannot read."""
    Steps(path, connection)
    application, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if application != APPLICATION:
        raise ForeignLedgerError(f"'{path}' is a database, but not a ledger of fedtune: give the folder of a run.")
    if version > FORMAT:
        raise ForeignLedgerError(
            f"'{path}' has format {version}, this program reads {FORMAT}: install a newer fedtune.", found=version, known=FORMAT
        )
    if version < FORMAT:
        raise ForeignLedgerError(
            f"'{path}' has format {version}, of an older fedtune; this program reads {FORMAT}: use the fedtune that began the "
            "run (its config.json names the settings), or start a new run.",
            found=version,
            known=FORMAT,
        )
    schema = connection.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL LIMIT ?", (len(SCHEMA) + 1,)).fetchall()
    pages = connection.execute("PRAGMA page_size").fetchone()[0]
    if {row[0] for row in schema} != set(SCHEMA) or len(schema) != len(SCHEMA) or pages > LARGEST_PAGE:
        raise DamagedLedgerError(f"'{path}' does not have the tables of format {FORMAT}: restore it.", row="the tables")


_NO_ROOM = "{}. Free some space and resume the run; every committed round is kept"
_HELD = "another process holds it. Close what has it open, and resume the run"
_CODES: dict[int, tuple[type[LedgerError], str]] = {
    sqlite3.SQLITE_FULL: (FullLedgerError, _NO_ROOM.format(shortage.FULL)),
    sqlite3.SQLITE_BUSY: (LockedLedgerError, _HELD),
    sqlite3.SQLITE_LOCKED: (LockedLedgerError, _HELD),
    sqlite3.SQLITE_CORRUPT: (DamagedLedgerError, "the file is damaged. Restore it from a copy"),
    sqlite3.SQLITE_INTERRUPT: (DamagedLedgerError, "its pages lead in circles. Restore it from a copy"),
    sqlite3.SQLITE_TOOBIG: (DamagedLedgerError, "a cell is larger than the file. Restore it from a copy"),
    sqlite3.SQLITE_NOMEM: (
        LedgerError,
        "memory is short. Raise the limit (ulimit -v) and resume the run; every committed round is kept",
    ),
    sqlite3.SQLITE_NOTADB: (
        ForeignLedgerError,
        "it is not an SQLite file. Give the folder of a run, or restore it from a copy",
    ),
}
_OF_THE_DISK = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of SQLite or of the system at `path` into one that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        kind, text = _of_sqlite(path, (code or 0) & 0xFF, error)
        raise kind(f"'{path}' cannot be used: {text}.", path=str(path), code=code) from error
    except UnicodeDecodeError as error:  # a message of SQLite's about a name of the schema
        text = "the names of its tables are damaged. Restore it from a copy"
        raise DamagedLedgerError(f"'{path}' cannot be used: {text}.", path=str(path), row="the tables") from error
    except OSError as error:
        short = shortage.disk(error)
        kind, text = (
            (FullLedgerError, _NO_ROOM.format(short)) if short else (LedgerError, f"{error.strerror}. Check permissions")
        )
        raise kind(f"'{path}' cannot be used: {text}.", path=str(path)) from error


def _of_sqlite(path: Path, code: int, error: sqlite3.Error) -> tuple[type[LedgerError], str]:
    """What an error of SQLite is, and what to do; it says "disk I/O error" of a disk without room too."""
    if "decode to UTF-8" in str(error) or "malformed" in str(error):
        return DamagedLedgerError, "a text in it is damaged. Restore it from a copy"
    if code in _OF_THE_DISK and (short := shortage.disk_at(path)):
        return FullLedgerError, _NO_ROOM.format(short)
    if code in _OF_THE_DISK:
        return LedgerError, f"{error}. Look for a disk or quota without room, a failing disk, and the permissions"
    return _CODES.get(code, (LedgerError, f"{for_screen(str(error))}. Check the disk and the permissions"))


def sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
