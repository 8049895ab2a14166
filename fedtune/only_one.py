"""A lock for one process at a time, on a file beside what it protects; it dies with its holder, also by kill -9."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from fedtune.private import FILE
from fedtune.regular import own_descriptor

POLL_SECONDS = 0.02


class OnlyOne:
    """Whoever constructs this holds the lock until `release` or the end of the process.

    Args:
        path: of the file, which is made if it is not there.
        patience: seconds to wait for one that another process holds: long enough for `is_held` of another to pass.

    Raises:
        BlockingIOError: another process (or another holder in this one) has it. Systems without `fcntl` have no lock.
        OSError: the file cannot be made, or is a link, pipe or folder.
    """

    def __init__(self, path: Path, patience: float = 0.0) -> None:
        self._descriptor = _opened(path, os.O_RDWR | os.O_CREAT)
        try:
            until = time.monotonic() + patience
            while not _lock(self._descriptor, shared=False, last=time.monotonic() >= until):
                time.sleep(POLL_SECONDS)
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Let others have it; again is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_held(path: Path) -> bool:
    """Whether a process holds the lock at `path`. It is shared with others who ask, for a moment, and changes nothing."""
    try:
        descriptor = _opened(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        _lock(descriptor, shared=True, last=True)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _opened(path: Path, flags: int) -> int:
    """The file at `path`, of its owner alone if it is made."""
    return own_descriptor(path, flags, lambda name, asked: os.open(name, asked, FILE))


def _lock(descriptor: int, *, shared: bool, last: bool) -> bool:
    """Take the lock and return whether it was free; raises BlockingIOError instead if this is the `last` try."""
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if last:
                raise
            return False
    return True
