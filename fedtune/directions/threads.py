"""Work on the pieces of a large tensor with as many threads as torch uses, results in the order of the pieces.

Kernels release the interpreter lock, so plain threads will do. numba's own parallel loops are not used: two of their
three thread layers break when called from two threads or after a fork, which servers do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], pieces: Sequence[T]) -> Iterator[R]:
    """function(piece) for each piece, in order; at once in `torch.get_num_threads()` threads if there are several."""
    workers = torch.get_num_threads()
    if workers == 1 or len(pieces) == 1:
        return map(function, pieces)
    return _workers(workers, os.getpid()).map(function, pieces)


@lru_cache(maxsize=1)
def _workers(count: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix=f"directions-{process}")
