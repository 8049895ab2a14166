"""What it means when a system has no room left: a full disk, a limit on a file's size, too little memory; in plain words."""

from __future__ import annotations

import errno
import sqlite3

NEAR = 1 << 17  # bytes below a limit at which a write may meet it
FULL = "the disk is full. Free some space"
MEMORY = "close other programs, or raise the limit of memory (ulimit -v)"
LIMITED = "a limit on the size of a file was met (ulimit -f). Raise it"
_ROOM = {errno.ENOSPC: FULL, errno.EDQUOT: "your quota of disk space is used up. Free some space", errno.EFBIG: LIMITED}
_SHORT = (  # what libraries say when memory is short
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "failed to map segment from shared object",
    "unable to allocate",
    "bad_alloc",
    "cannot apply additional memory protection",
    "can't start new thread",
)


def why_no_room(error: OSError) -> str:
    """Why there is no room on the disk, and what to do ("" if the error is another one); a clause without a full stop."""
    return _ROOM.get(error.errno or 0, "")


def met_size_limit(size: int) -> bool:
    """Whether a file of `size` bytes stands at the limit that this process has for files."""
    try:
        import resource
    except ImportError:  # Windows has none
        return False
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return limit != resource.RLIM_INFINITY and size + NEAR >= limit


def memory_is_short(error: BaseException | None) -> bool:
    """Whether `error`, or one that it came from, is about memory."""
    for _ in range(8):
        if error is None:
            return False
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOMEM or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, OSError | ImportError | RuntimeError) and any(text in str(error).lower() for text in _SHORT):
            return True
        error = error.__cause__ or error.__context__
    return False
