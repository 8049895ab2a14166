"""Opening a file that somebody else may have named: a regular one of a size that can be meant, no device, pipe or socket."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

LARGEST_DATA = 8 << 30
"""Bytes of a data file: rows are held in memory, where they take several times as much."""

LARGEST_TEXT = 256 << 20
"""Bytes of a model's JSON, vocabulary or template: the largest tokenizers have some 40 MB."""

_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def open_regular(path: Path, most: int = LARGEST_DATA) -> BufferedReader:
    """`path`, open for reading; nothing is read, and nothing waits for whoever is at the other end.

    Raises:
        OSError: it is not there, not a regular file (or a link to one), or larger than `most` bytes; `strerror` says which.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError:
        raise OSError(errno.EINVAL, "its name is no name of a file", str(path)) from None
    try:
        check_regular(os.fstat(descriptor), path, most)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(state: os.stat_result, path: Path, most: int) -> None:
    """Raise OSError unless `state` is that of a regular file of at most `most` bytes."""
    if not stat.S_ISREG(state.st_mode):
        kind = next((name for is_one, name in _KINDS if is_one(state.st_mode)), "a device")
        raise OSError(errno.EINVAL, f"it is {kind} and no file", str(path))
    if state.st_size > most:
        raise OSError(errno.EFBIG, f"it has {state.st_size:,} bytes, more than {most:,}", str(path))
