"""Work on the pieces of a large tensor with as many threads as torch uses, results in the order of the pieces.

Kernels release the interpreter lock, so plain threads will do. numba's own parallel loops are not used: two of their
three thread layers break when called from two threads or after a fork, which servers do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], pieces: Sequence[T]) -> Iterator[R]:
    """function(piece) for each piece, in order; at once in `torch.get_num_threads()` threads, this one among them.

    Each thread takes the next piece when it has done one, so that a tensor costs one wake-up of every other thread.
    """
    workers = min(torch.get_num_threads(), len(pieces))
    if workers <= 1:
        return map(function, pieces)
    results: dict[int, R] = {}
    numbers = iter(range(len(pieces)))  # taking the next one is a single step of the interpreter

    def work() -> None:
        for number in numbers:
            results[number] = function(pieces[number])

    pool = _workers(torch.get_num_threads() - 1, os.getpid())
    others = [pool.submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        wait(others)
    for other in others:
        other.result()
    return (results[number] for number in range(len(pieces)))


@lru_cache(maxsize=1)
def _workers(count: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix=f"directions-{process}")
