"""Folders and files of their owner alone, from their first moment and whatever the umask; what is there already stays as it is.

A folder that fedtune makes for keys, runs or caches has mode 700. In such a folder files have 600; in one that others may
enter, which somebody else made or opened on purpose, the umask decides, as for everybody's files.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

FOLDER, FILE, ORDINARY = 0o700, 0o600, 0o666
OTHERS = 0o077


def make_folder(path: Path, *, exist_ok: bool = False) -> None:
    """Make `path` and the folders above it that are missing, each of mode 700.

    Raises:
        FileExistsError: it is there (and `exist_ok` is false), or is no folder. OSError: it cannot be made.
    """
    if not path.parent.exists():
        make_folder(path.parent, exist_ok=True)
    try:
        path.mkdir(FOLDER)
    except FileExistsError:
        if exist_ok and path.is_dir():
            return
        raise
    path.chmod(FOLDER)


def is_private(folder: Path) -> bool:
    """Whether nobody but its owner may enter `folder`."""
    return not stat.S_IMODE(folder.stat().st_mode) & OTHERS


def opener(path: str, flags: int) -> int:
    """For `open(..., opener=opener)`: a new file in a private folder is private too."""
    return os.open(path, flags, FILE if is_private(Path(path).parent) else ORDINARY)


def ordinary_mode(folder: Path) -> int:
    """The mode of an ordinary new file in `folder`, seen on one: reading the umask would change it for all threads."""
    probe = folder / f".{os.getpid()}.mode"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, ORDINARY)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
