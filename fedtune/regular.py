"""Opening files that somebody else may have named or made: regular ones of a size that can be meant, no device or pipe."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

LARGEST_DATA = 8 << 30
"""Bytes of a data file: rows are held in memory, where they take several times as much."""

LARGEST_TEXT = 256 << 20
"""Bytes of a model's JSON, vocabulary or template: the largest tokenizers have some 40 MB."""

ANY = sys.maxsize

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a symbolic link"}


def open_regular(path: Path, most: int = LARGEST_DATA, *, follow: bool = True) -> BufferedReader:
    """`path`, open for reading; nothing is read, and nothing waits for whoever is at the other end.

    Args:
        follow: through a symbolic link too.

    Raises:
        OSError: it is not there, not a regular file (or a link to one), or larger than `most` bytes; `strerror` says which.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    except ValueError:
        raise OSError(errno.EINVAL, "its name is no name of a file", str(path)) from None
    try:
        check_regular(os.fstat(descriptor), path, most)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, most: int, *, follow: bool = True) -> bytes:
    """The content of the regular file at `path`, of at most `most` bytes. Raises OSError as `open_regular`."""
    with open_regular(path, most, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        return file.read(size)  # what is appended meanwhile is not asked for


def own_descriptor(path: Path, flags: int, opener: Callable[[str, int], int]) -> int:
    """A descriptor of the regular file at `path`, itself and not what a link there leads to; nothing is waited for.

    Args:
        flags: of os.open. opener: (path, flags) -> descriptor, which gives a new file its mode.

    Raises:
        OSError: it cannot be opened or made, or is a link, pipe, folder or device.
    """
    descriptor = opener(str(path), flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        check_regular(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(state: os.stat_result, path: Path, most: int = ANY) -> None:
    """Raise OSError unless `state` is that of a regular file of at most `most` bytes."""
    if not stat.S_ISREG(state.st_mode):
        kind = _KINDS.get(stat.S_IFMT(state.st_mode), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    if state.st_size > most:
        raise OSError(errno.EINVAL, f"it has {state.st_size:,} bytes, and {most:,} are the most that it may have", str(path))
