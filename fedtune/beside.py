"""What is too large for a row of the ledger: files beside it, named by the SHA-256 of what they hold.

SQLite takes no value above 1 GB, and reads a value as a whole. A method that keeps a number for each weight has states and
updates as large as the model. Such a value is written and flushed to `values/` before its row; the row holds MARK, the
digest and the length, which the chains of the ledger cover. No value of a row itself begins with MARK.

A file that no row names is what a process left that died before its row: the next writer removes it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from weakref import WeakKeyDictionary

from fedtune.errors import DamagedLedgerError
from fedtune.ledger_file import sync
from fedtune.pieces import Buffer, slices
from fedtune.private import make_folder, opener
from fedtune.regular import ANY, open_regular

FOLDER = "values"
LARGE = 1 << 20
"""Bytes from which a value lies beside the ledger: far above what a method of few numbers ever writes."""
MARK = b"\x00fedtune beside\x00"
REFERENCE = len(MARK) + 32 + 8  # bytes of what names a file


class Beside:
    """The values beside the ledger in `folder`. Errors of the disk come as OSError."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FOLDER
        self._kept: WeakKeyDictionary[mmap.mmap, bytes] = WeakKeyDictionary()

    def store(self, parts: Iterable[Buffer]) -> bytes:
        """What the row holds of the value whose bytes are `parts`; on the disk when this returns if it is large.

        Raises DamagedLedgerError if somebody put a link in place of the folder.
        """
        small, rest = _small(parts)
        return small if rest is None else self._write(rest)

    def keep(self, value: Buffer) -> Buffer:
        """`value`, in a file that is mapped into memory if it is large; `stored` knows its name."""
        if len(value) <= LARGE:
            return value
        stored = self.store([value])
        found = self.value(stored, hashed=False)
        if isinstance(found, mmap.mmap):
            self._kept[found] = stored
        return found

    def stored(self, value: Buffer) -> bytes:
        """`store` of one value; of one that `keep` returned without reading or writing it again."""
        known = self._kept.get(value) if isinstance(value, mmap.mmap) else None
        return self.store([value]) if known is None else known

    def value(self, stored: bytes, *, hashed: bool = True) -> Buffer:
        """The value that a row holds or names.

        Args:
            hashed: its content is read and held against its digest.

        Raises:
            DamagedLedgerError: its file is missing, another one, or no regular file.
        """
        if not is_reference(stored):
            return stored
        name, size = _named(stored)
        path = self.path / name
        try:
            with open_regular(path, ANY, follow=False) as file:
                found = os.fstat(file.fileno()).st_size
                if found != size or not size:
                    raise _bad(path, f"it has {found:,} bytes and not {size:,}")
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _bad(path, error.strerror or type(error).__name__) from None
        if hashed and _digest(memory) != name:
            raise _bad(path, "its content does not have the digest that is its name")
        return memory

    def sweep(self, kept: Iterable[bytes]) -> None:
        """Remove every file but those that `kept`, the values of rows, name."""
        if not self.path.is_dir() or self.path.is_symlink():
            return
        names = {_named(stored)[0] for stored in kept if is_reference(stored)}
        for path in self.path.iterdir():
            if path.name not in names and (path.is_symlink() or not path.is_dir()):
                path.unlink()

    def _write(self, parts: Iterable[Buffer]) -> bytes:
        if self.path.is_symlink():
            raise _bad(self.path, "it is a symbolic link, and nothing is written outside the run")
        make_folder(self.path, exist_ok=True)
        new = self.path / f".{os.getpid()}.new"
        new.unlink(missing_ok=True)
        try:
            with open(new, "xb", opener=opener) as file:
                stored = _reference(parts, file.write)
                file.flush()
                os.fsync(file.fileno())
            new.rename(self.path / _named(stored)[0])  # one of that name holds the same
            sync(self.path)
        finally:
            new.unlink(missing_ok=True)
        return stored


def named(parts: Iterable[Buffer]) -> bytes:
    """What `Beside.store` returns; nothing is written."""
    small, rest = _small(parts)
    return small if rest is None else _reference(rest, len)


def is_reference(stored: bytes) -> bool:
    """Whether a row names a file and does not hold the value itself."""
    return len(stored) == REFERENCE and stored.startswith(MARK)


def size_of(stored: bytes) -> int:
    """Bytes of the value that a row holds or names."""
    return _named(stored)[1] if is_reference(stored) else len(stored)


def _named(stored: bytes) -> tuple[str, int]:
    """Name and bytes of the file that a row names."""
    return stored[len(MARK) : -8].hex(), int.from_bytes(stored[-8:], "little")


def _digest(memory: mmap.mmap) -> str:
    digest = hashlib.sha256()
    for piece in slices(memory):
        digest.update(piece)
    return digest.hexdigest()


def _small(parts: Iterable[Buffer]) -> tuple[bytes, Iterable[Buffer] | None]:
    """The value if it is not large; else all its parts again."""
    first, size, rest = list[Buffer](), 0, iter(parts)
    for part in rest:
        first.append(part)
        size += len(part)
        if size > LARGE:
            return b"", chain(first, rest)
    return b"".join(first), None


def _reference(parts: Iterable[Buffer], write: Callable[[Buffer], int]) -> bytes:
    """What names the value of these parts, each of which is written."""
    digest, size = hashlib.sha256(), 0
    for part in parts:
        for piece in slices(part):
            write(piece)
            digest.update(piece)
        size += len(part)
    return MARK + digest.digest() + size.to_bytes(8, "little")


def _bad(path: Path, why: str) -> DamagedLedgerError:
    return DamagedLedgerError(f"'{path}' is damaged: {why}. Restore it from a copy.", row=f"the file {path.name}", why=why)
