"""How a kernel is compiled: numba without fast-math, released from the interpreter lock, and kept on disk where that works.

numba notices a change of a kernel's own file only, not of a file whose functions it calls, so the folder of the cache
is named after the text of all kernels. It also asks for the file's path and age, which differ in every clone and in every
copy of the app that Flower unpacks, and compiling takes half a minute: so kernels are compiled as functions of a copy of
their file in that folder. Where no folder can be written, kernels are compiled once per process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.extending import intrinsic

from fedtune.private import make_folder

Function = TypeVar("Function", bound=Callable[..., Any])

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "boundscheck": False}


def kernel(function: Function) -> Function:
    """Compile `function` on its first call for each signature."""
    folder = _cache_folder()
    if folder is None:
        return numba.njit(**OPTIONS)(function)  # type: ignore[no-any-return]
    settings: Any = numba.config
    before = settings.CACHE_DIR
    settings.CACHE_DIR = folder
    try:
        return numba.njit(cache=True, **OPTIONS)(_of_copy(function, Path(folder)))  # type: ignore[no-any-return]
    except (RuntimeError, OSError):  # numba: "cannot cache function: no locator available"
        return numba.njit(**OPTIONS)(function)  # type: ignore[no-any-return]
    finally:
        settings.CACHE_DIR = before


def _of_copy(function: Function, folder: Path) -> Function:
    """`function`, as if it stood in a copy of its file in `folder`, which is made once. Raises OSError."""
    source = Path(function.__code__.co_filename)
    copy = folder / source.name
    if not copy.exists():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(source.read_bytes())
        with contextlib.suppress(FileExistsError):
            os.link(file.name, copy)  # the first one stays, whoever else is at it: its age names the kernels
        os.unlink(file.name)
    function.__code__ = function.__code__.replace(co_filename=str(copy))
    return function


def instructions(typed: Callable[..., Any]) -> Any:
    """numba's intrinsic: a function for kernels to call, made of LLVM instructions.

    `typed` gets the types of the arguments and returns the signature and the function that builds the instructions.
    """
    return intrinsic(typed)


@cache
def _cache_folder() -> str | None:
    """The first writable of: NUMBA_CACHE_DIR, the user's cache, this package's __pycache__; None if there is none."""
    here = Path(__file__).parent
    texts = b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    name = f"kernels-{hashlib.sha256(texts).hexdigest()[:16]}"
    user = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for parent in (os.environ.get("NUMBA_CACHE_DIR"), os.path.join(user, "fedtune"), here / "__pycache__"):
        if parent and _writable(folder := Path(parent) / name):
            return str(folder)
    return None


def _writable(folder: Path) -> bool:
    try:
        make_folder(folder, exist_ok=True)  # what is in it is run
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
