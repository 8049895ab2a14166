"""Work on the pieces of a large tensor, or on many small tensors, with as many threads as torch uses, results in order.

Kernels release the interpreter lock, so plain threads will do. numba's own parallel loops are not used: two of their
three thread layers break when called from two threads or after a fork, which servers do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

from fedtune.layout import ALIGN

T = TypeVar("T")
R = TypeVar("R")

PIECE = 8 * ALIGN  # elements below which a second thread costs more than it saves: to wake one takes some 100 microseconds
SHARES = 4  # of all elements for each thread: a tensor with more than a share is cut into pieces

_here = threading.local()


def ordered_map(function: Callable[[T], R], pieces: Sequence[T]) -> Iterator[R]:
    """function(piece) for each piece, in order; at once in `torch.get_num_threads()` threads, this one among them.

    Each thread takes the next piece when it has done one, so that a tensor costs one wake-up of every other thread. In
    work of that kind, in the thread that does it and in turn.
    """
    workers = 1 if getattr(_here, "at_work", False) else min(torch.get_num_threads(), len(pieces))
    if workers <= 1:
        return map(function, pieces)
    results: dict[int, R] = {}
    numbers = iter(range(len(pieces)))  # taking the next one is a single step of the interpreter

    def work() -> None:
        _here.at_work = True
        try:
            for number in numbers:
                results[number] = function(pieces[number])
        finally:
            _here.at_work = False

    pool = _workers(torch.get_num_threads() - 1, os.getpid())
    others = [pool.submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        wait(others)
    for other in others:
        other.result()
    return (results[number] for number in range(len(pieces)))


def each_tensor(function: Callable[[int], object], sizes: Sequence[int]) -> None:
    """function(index) for every tensor, given the elements of each: small ones side by side, large ones in turn before.

    `function` uses `ordered_map` for the pieces of a large one, and what it does with one tensor concerns no other.
    """
    threads, elements = torch.get_num_threads(), sum(sizes)
    if threads == 1 or elements < 2 * PIECE:
        for index in range(len(sizes)):
            function(index)
        return
    large = [index for index, size in enumerate(sizes) if size > elements / (SHARES * threads)]
    for index in large:
        function(index)
    apart = set(large)
    for _ in ordered_map(function, [index for index in range(len(sizes)) if index not in apart]):
        pass


@lru_cache(maxsize=1)
def _workers(count: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix=f"directions-{process}")
