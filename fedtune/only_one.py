"""A lock for one process at a time, on a file beside what it protects; it dies with its holder, also by kill -9."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class OnlyOne:
    """Whoever constructs this holds the lock until `release` or the end of the process.

    Raises:
        BlockingIOError: another process (or another holder in this one) has it. Systems without `fcntl` have no lock.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Let others have it; again is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _lock(descriptor: int) -> None:
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
