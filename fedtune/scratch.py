"""Room for what is as large as a model and needed for a while: memory, or a file of the cache folder without a name.

The file has no name from the moment it is opened (on Windows: until it is closed), so nothing is left of it, however the
process ends. It is mapped: its pages are the system's, which takes them back where memory is short.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fedtune.errors import ModelError
from fedtune.private import make_folder

IN_MEMORY = 1 << 26
"""Bytes up to which it is memory: 64 MiB, as in `perturb`."""


def room(shape: tuple[int, ...], kind: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array to be filled. Raises ModelError if the cache folder has no room, or cannot be written."""
    size = prod(shape) * np.dtype(kind).itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype=kind)
    with nameless_file(size) as file:
        memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_WRITE)
    return np.frombuffer(memory, dtype=kind).reshape(shape)


def trim() -> None:
    """Have the C library give freed memory back to the system, as glibc does of itself only at the end of its heap."""
    release = _c_library()
    if release is not None:
        release(0)


@cache
def _c_library() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where there is another C library."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def nameless_file(size: int) -> BinaryIO:
    """A file of `size` bytes without a name, all of them allocated, so that writing to its mapping cannot fail later."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedtune"
    try:
        make_folder(folder, exist_ok=True)
        file: BinaryIO = tempfile.TemporaryFile(dir=folder, prefix="weights-")  # noqa: SIM115 - open as long as its mapping
    except OSError as error:
        raise _no_room(error, folder, size) from None
    try:
        _allocate(file, size)
    except OSError as error:
        file.close()
        raise _no_room(error, folder, size) from None
    return file


def _no_room(error: OSError, folder: Path, size: int) -> ModelError:
    return ModelError(
        f"What is as large as the model needs {size:,} bytes of disk in '{folder}' ({error.strerror}): "
        "make room, or set XDG_CACHE_HOME to a folder on a larger disk.",
        folder=str(folder),
        bytes=size,
    )


def _allocate(file: BinaryIO, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(1 << 20)
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()
