"""Every state that a killed run can leave on the disk: the folder copied at each write of one run, torn and untorn.

What `kill -9` leaves is what the operating system holds at that moment, so copying the folder before and after each flush,
rename, removal and commit, and with each written piece cut in half, gives all of them from a single run. Copies with equal
files are kept once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fedtune.ledger_file

WAL_HEADER, WAL_FRAME = 32, 24 + fedtune.ledger_file.PAGE  # bytes of a write-ahead log (SQLite's file format, section 4)


@dataclass
class Crashes:
    """The copies: `folders` by what happened next to each; `writes` counts what was watched."""

    watched: Path
    into: Path
    folders: dict[str, Path] = field(default_factory=dict)
    writes: int = 0
    _seen: set[bytes] = field(default_factory=set)

    def copy(self, moment: str) -> Path | None:
        """Keep the folder as it is now, unless an earlier copy is equal."""
        content = _digest(self.watched)
        if content in self._seen:
            return None
        self._seen.add(content)
        target = self.into / f"{len(self.folders):04d}"
        shutil.copytree(self.watched, target)
        self.folders[f"{len(self.folders):04d} {moment}"] = target
        return target

    def torn(self, path: Path, begin: int, moment: str) -> None:
        """Keep the folder with what was written to `path` since `begin` cut in half."""
        end = path.stat().st_size
        if end - begin < 2:
            return
        whole = path.read_bytes()
        path_there = path.relative_to(self.watched)
        target = self.into / f"{len(self.folders):04d}"
        shutil.copytree(self.watched, target)
        (target / path_there).write_bytes(whole[: begin + (end - begin) // 2])
        self.folders[f"{len(self.folders):04d} torn {moment}"] = target


def _digest(folder: Path) -> bytes:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "log.jsonl" and not path.name.endswith("-shm"):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.digest()


@contextmanager
def watching(crashes: Crashes, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Copy the folder at every write that happens inside the `with` block."""
    real_fsync, real_replace, real_rename, real_unlink = os.fsync, Path.replace, Path.rename, Path.unlink

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        crashes.writes += 1
        if path.is_file() and path.is_relative_to(crashes.watched):
            lines = path.read_bytes()[:-1].rfind(b"\n") + 1 if path.suffix == ".jsonl" else 0
            crashes.torn(path, lines, f"flush of {path.name}")
        crashes.copy(f"before the flush of {path.name}")
        real_fsync(descriptor)

    def around(real: Any, verb: str) -> Any:
        def call(self: Path, *arguments: Any, **options: Any) -> Any:
            crashes.writes += 1
            crashes.copy(f"before the {verb} of {self.name}")
            done = real(self, *arguments, **options)
            crashes.copy(f"after the {verb} of {self.name}")
            return done

        return call

    class Watched(sqlite3.Connection):
        """Commits are the ledger's writes; what a commit appends to the log is also cut at and inside every frame."""

        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if statement != "COMMIT":
                return super().execute(statement, *values)
            crashes.writes += 1
            crashes.copy("before a commit")
            log = _log_of(self)
            begin = log.stat().st_size if log.exists() else 0
            done = super().execute(statement)
            _torn_log(crashes, log, begin)
            crashes.copy("after a commit")
            return done

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        return real_connect(*arguments, **{**options, "factory": Watched})

    real_connect = sqlite3.connect
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(Path, "replace", around(real_replace, "rename"))
        patch.setattr(Path, "rename", around(real_rename, "rename"))
        patch.setattr(Path, "unlink", around(real_unlink, "removal"))
        patch.setattr(fedtune.ledger_file.sqlite3, "connect", connect)
        yield


def _log_of(connection: sqlite3.Connection) -> Path:
    return Path(f"{connection.execute('PRAGMA database_list').fetchone()[2]}-wal")


def _torn_log(crashes: Crashes, log: Path, begin: int) -> None:
    """Keep the folder with the log cut at the end of each new frame but the last, and in the middle of each."""
    whole = log.read_bytes()
    first = max(begin, WAL_HEADER)
    cuts = [cut for start in range(first, len(whole), WAL_FRAME) for cut in (start, start + WAL_FRAME // 2)]
    for cut in cuts:
        target = crashes.into / f"{len(crashes.folders):04d}"
        shutil.copytree(crashes.watched, target)
        (target / log.relative_to(crashes.watched)).write_bytes(whole[:cut])
        crashes.folders[f"{len(crashes.folders):04d} torn commit at byte {cut - first} of {len(whole) - first}"] = target
