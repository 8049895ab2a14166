"""Random signs, one bit a position, applied to runs of floats 32 at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedtune.directions.cpu.compiled import kernel

LANES = (np.uint32(1) << np.arange(32, dtype=np.uint32)).astype(np.uint32)


@kernel
def copy_unless_same(out: Any, base: Any) -> None:
    """out = base; nothing where they are one array. The kernels then work in place: a loop over two arrays that may be
    one and the same is compiled to scalar code."""
    if out.ctypes.data != base.ctypes.data:
        for i in range(out.shape[0]):
            out[i] = base[i]


@kernel
def add_signs(out: Any, words: Any, offset: int, c: Any) -> None:
    """out[i] += -c where bit (offset + i) of the uint32 `words` is set, else += c."""
    count = out.shape[0]
    head = min(count, (32 - (offset & 31)) & 31)
    for i in range(head):
        bit = offset + i
        out[i] += -c if words[bit >> 5] & LANES[bit & 31] != 0 else c
    first = (offset + head) >> 5
    whole = (count - head) >> 5
    for j in range(whole):
        word = words[first + j]
        run = out[head + 32 * j : head + 32 * j + 32]
        for i in range(32):
            run[i] += -c if word & LANES[i] != 0 else c
    done = head + 32 * whole
    for i in range(count - done):
        out[done + i] += -c if words[first + whole] & LANES[i] != 0 else c


@kernel
def add_flipped(out: Any, values: Any, words: Any, offset: int) -> None:
    """out[i] += -values[i] where bit (offset + i) of the uint32 `words` is set, else += values[i]; two arrays."""
    count = values.shape[0]
    head = min(count, (32 - (offset & 31)) & 31)
    for i in range(head):
        bit = offset + i
        out[i] += -values[i] if words[bit >> 5] & LANES[bit & 31] != 0 else values[i]
    first = (offset + head) >> 5
    whole = (count - head) >> 5
    for j in range(whole):
        word = words[first + j]
        run, source = out[head + 32 * j : head + 32 * j + 32], values[head + 32 * j : head + 32 * j + 32]
        for i in range(32):
            run[i] += -source[i] if word & LANES[i] != 0 else source[i]
    done = head + 32 * whole
    for i in range(count - done):
        out[done + i] += -values[done + i] if words[first + whole] & LANES[i] != 0 else values[done + i]


@kernel
def copy_flipped(out: Any, values: Any, words: Any, offset: int) -> None:
    """out[i] = -values[i] where bit (offset + i) of the uint32 `words` is set, else values[i]; two arrays."""
    count = values.shape[0]
    head = min(count, (32 - (offset & 31)) & 31)
    for i in range(head):
        bit = offset + i
        out[i] = -values[i] if words[bit >> 5] & LANES[bit & 31] != 0 else values[i]
    first = (offset + head) >> 5
    whole = (count - head) >> 5
    for j in range(whole):
        word = words[first + j]
        run, source = out[head + 32 * j : head + 32 * j + 32], values[head + 32 * j : head + 32 * j + 32]
        for i in range(32):
            run[i] = -source[i] if word & LANES[i] != 0 else source[i]
    done = head + 32 * whole
    for i in range(count - done):
        out[done + i] = -values[done + i] if words[first + whole] & LANES[i] != 0 else values[done + i]


@kernel
def signed_sum(values: Any, words: Any, offset: int, lanes: Any) -> Any:
    """float64: the sum of the values with the signs of `add_signs`; `lanes` is a scratch of 32 float64.

    Bit b of every word adds to lane b; the lanes are added in order.
    """
    lanes[:] = 0.0
    count = values.shape[0]
    head = min(count, (32 - (offset & 31)) & 31)
    for i in range(head):
        bit = offset + i
        value = np.float64(values[i])
        lanes[bit & 31] += -value if words[bit >> 5] & LANES[bit & 31] != 0 else value
    first = (offset + head) >> 5
    whole = (count - head) >> 5
    for j in range(whole):
        word = words[first + j]
        run = values[head + 32 * j : head + 32 * j + 32]
        for i in range(32):
            value = np.float64(run[i])
            lanes[i] += -value if word & LANES[i] != 0 else value
    done = head + 32 * whole
    for i in range(count - done):
        value = np.float64(values[done + i])
        lanes[i] += -value if words[first + whole] & LANES[i] != 0 else value
    total = 0.0
    for i in range(32):
        total += lanes[i]
    return total
