"""What a full disk, a limit on files and too little memory look like to a program, and what they are called."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL = "the disk is full"
LIMITED = "a limit on the size of files is reached (ulimit -f)"
LEAST_ROOM = 1 << 16  # bytes; with less a database cannot make the files beside it

_MEMORY = (  # of the loader, of torch on CPU and GPU, of the system
    "cannot allocate memory",
    "can't allocate memory",
    "failed to map segment",
    "out of memory",
    "not enough memory",
    "unable to allocate",
    "bad_alloc",
    "can't start new thread",
    "cannot apply additional memory protection",
)


def disk(error: OSError) -> str:
    """What the disk lacks, if that is what `error` says; else ''."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FULL
    return LIMITED if error.errno == errno.EFBIG else ""


def disk_at(path: Path) -> str:
    """What the disk lacks where `path` is, for a library that says no more than that writing failed; '' if nothing is seen."""
    try:
        if shutil.disk_usage(path.parent).free < LEAST_ROOM:
            return FULL
        import resource  # not on every system
    except (OSError, ImportError):
        return ""
    return LIMITED if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY else ""


def memory(error: BaseException) -> bool:
    """Whether `error`, or what it came from, says that memory is short."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return False
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return True
        if isinstance(seen, ImportError | OSError | RuntimeError) and any(sign in str(seen).lower() for sign in _MEMORY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
