"""Numbers in bfloat16, as uint16 of their bits, to float32 and back: the upper half of a float32 is a bfloat16.

torch converts as well, but starts threads of its own for runs of this size, inside threads that work on pieces already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from fedtune.directions.cpu.compiled import kernel
from fedtune.directions.cpu.philox import random_planes

HALF, QUIET = np.uint32(16), np.uint32(0x7FC0)
INFINITE, LARGEST = np.uint32(0x7F800000), np.uint32(0x7F7F0000)
ABSOLUTE, LOW = np.uint32(0x7FFFFFFF), np.uint32(0xFFFF)
BLOCKS = 512  # of eight random numbers of 16 bits, made at once


@kernel
def widen(out: Any, bits: Any) -> None:
    """out float32 = the numbers with these bits."""
    wide = out.view(np.uint32)
    for i in range(bits.shape[0]):
        wide[i] = np.uint32(bits[i]) << HALF


@kernel
def narrow(bits: Any, values: Any) -> None:
    """bits = float32 `values`, each rounded to the nearest, ties to even."""
    wide = values.view(np.uint32)
    for i in range(bits.shape[0]):
        bits[i] = np.uint16(_nearest(wide[i]))


@kernel
def narrow_stochastically(bits: Any, values: Any, p0: int, draw: int, purpose: int, key0: int, key1: int) -> None:
    """bits = `values`, each rounded to one of its two neighbours, up with the chance that makes the mean exact.

    Position p takes 16 random bits, number p mod 8 of block p div 8: words in order, low half first. What lies beyond the
    largest number is rounded to the nearest.
    """
    wide = values.view(np.uint32)
    planes = np.empty((4, BLOCKS), np.uint32)
    halves = np.empty(8 * BLOCKS, np.uint32)
    done = 0
    while done < bits.shape[0]:
        p = p0 + done
        skip = p & 7
        size = min(8 * BLOCKS - skip, bits.shape[0] - done)
        count = (skip + size + 7) >> 3
        random_planes(
            planes[0, :count], planes[1, :count], planes[2, :count], planes[3, :count], p >> 3, draw, purpose, key0, key1
        )
        for j in range(count):
            for m in range(4):
                halves[8 * j + 2 * m] = planes[m, j] & LOW
                halves[8 * j + 2 * m + 1] = planes[m, j] >> HALF
        run, source, chance = bits[done : done + size], wide[done : done + size], halves[skip : skip + size]
        for i in range(size):
            x = source[i]
            chosen = np.uint32(x + chance[i]) >> HALF
            run[i] = np.uint16(chosen if (x & ABSOLUTE) < LARGEST else _nearest(x))
        done += size


@kernel
def _nearest(x: Any) -> Any:
    rounded = np.uint32(x + np.uint32(0x7FFF) + (x >> HALF & np.uint32(1))) >> HALF
    return QUIET if (x & ABSOLUTE) > INFINITE else rounded


# ---------------------------------------------------------------------------------------------------- either kind of run
# A kernel that takes both is compiled once for each; of float32 runs the memory itself is used.


def as_floats(scratch: Any, run: Any) -> Any:
    """A run in float32: itself, or what its bits say, in the scratch."""


def floats_of(scratch: Any, run: Any) -> Any:
    """Where the float32 numbers of a run are to be written before `put_floats`."""


def put_floats(run: Any, values: Any) -> None:
    """run = the numbers written to `floats_of` it, rounded to nearest."""


@overload(as_floats, strict=False)
def _as_floats(scratch: Any, run: Any) -> Any:
    if run.dtype != types.uint16:
        return lambda scratch, run: run

    def widened(scratch: Any, run: Any) -> Any:
        values = scratch[: run.shape[0]]
        widen(values, run)
        return values

    return widened


@overload(floats_of, strict=False)
def _floats_of(scratch: Any, run: Any) -> Any:
    if run.dtype != types.uint16:
        return lambda scratch, run: run
    return lambda scratch, run: scratch[: run.shape[0]]


@overload(put_floats, strict=False)
def _put_floats(run: Any, values: Any) -> Any:
    if run.dtype != types.uint16:
        return lambda run, values: None

    def narrowed(run: Any, values: Any) -> None:
        narrow(run, values)

    return narrowed
