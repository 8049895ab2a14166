"""Work on arrays as large as a model, a few megabytes at a time, so that no step needs a second one.

An array may lie in a file that is mapped into memory (`fedtune.beside`). Its pages are given back behind the piece in hand:
the process then holds a piece of it, however large it is.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Buffer = bytes | bytearray | memoryview | mmap.mmap
AT_ONCE = 1 << 20  # numbers in a piece
T = TypeVar("T", bound=np.generic)


def pieces(array: npt.NDArray[T], at_once: int = AT_ONCE) -> Iterator[npt.NDArray[T]]:
    """`array` [n] in views of at most `at_once` numbers, in order."""
    for _, piece in placed(array, at_once):
        yield piece


def placed(array: npt.NDArray[T], at_once: int = AT_ONCE) -> Iterator[tuple[slice, npt.NDArray[T]]]:
    """`pieces` with where they stand."""
    for where, (piece,) in together([array], at_once):
        yield where, piece


def together(arrays: Sequence[npt.NDArray[T]], at_once: int = AT_ONCE) -> Iterator[tuple[slice, list[npt.NDArray[T]]]]:
    """The pieces of several arrays [n] that stand at the same place, and where that is."""
    mapped = [memory for memory in map(mapping, arrays) if memory is not None]
    for start in range(0, len(arrays[0]), at_once):
        where = slice(start, min(start + at_once, len(arrays[0])))
        yield where, [array[where] for array in arrays]
        for memory in mapped:
            give_back(memory)


def joined(parts: Iterable[Buffer]) -> bytes:
    """The parts as one value, with no second copy of it on the way."""
    whole = BytesIO()
    for part in parts:
        whole.write(part)
    return whole.getvalue()


def all_finite(values: npt.NDArray[np.float32]) -> bool:
    """Whether every number of `values` [n] is finite."""
    return all(bool(np.isfinite(piece).all()) for piece in pieces(values))


def slices(data: Buffer, size: int = 1 << 24) -> Iterator[memoryview]:
    """`data` in views of at most `size` bytes, in order."""
    with memoryview(data) as view:
        for start in range(0, len(view), size):
            with view[start : start + size] as piece:
                yield piece
            if isinstance(data, mmap.mmap):
                give_back(data)


def mapping(array: npt.NDArray[Any]) -> mmap.mmap | None:
    """The mapped file that `array` lies in, if it lies in one."""
    owner: object = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    return owner if isinstance(owner, mmap.mmap) else None


def release(array: npt.NDArray[Any]) -> None:
    """Say that `array` is not needed for a while: if it lies in a file, its pages are the system's again."""
    memory = mapping(array)
    if memory is not None:
        give_back(memory)


def give_back(memory: mmap.mmap) -> None:
    """Let the system have the pages of a mapped file back; they are read again when they are needed."""
    if hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED)
