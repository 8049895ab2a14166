"""Family hadamard on the CPU: one fast Walsh-Hadamard transform a tile, whatever the size of the pool.

z_k[p] = D[p] * (-1)^popcount(i & pi_t(k)) with i = p mod n and t = p // n. D is one random bit a position, shared by the
pool; pi_t is the tile's permutation of the columns. A run may start and end inside a tile: the columns are then folded to
the width that the run needs, since H[i, c] with i < 2^b depends on c mod 2^b only.

`tile` is int64 [6]: key words 0 and 1 of the pool, log2 n, and the three shifts of the permutation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedtune.directions.counters import COLUMNS, SIGNS
from fedtune.directions.cpu.bfloat16 import as_floats, floats_of, put_floats
from fedtune.directions.cpu.compiled import kernel
from fedtune.directions.cpu.permute import permute16
from fedtune.directions.cpu.philox import SCRATCH, random_words
from fedtune.directions.cpu.signs import add_flipped, add_signs, copy_flipped, signed_bytes
from fedtune.directions.cpu.transform import SMALLEST, walsh_hadamard

# Bit i of mask q is bit q of i, so the signs of column c over 32 positions are the xor of the masks of its set bits.
MASKS = np.array([0xAAAAAAAA, 0xCCCCCCCC, 0xF0F0F0F0, 0xFF00FF00, 0xFFFF0000], dtype=np.uint32)


@kernel
def add(out: Any, base: Any, p0: int, k: int, c: Any, tile: Any) -> None:
    """out[i] = base[i] + c * z_k[p0 + i], from sign bits alone; both float32, or both the bits of bfloat16 numbers."""
    n = 1 << tile[2]
    wide = np.empty(n, np.float32)
    column = np.empty(1, np.uint16)
    words = np.empty(SCRATCH * (min(n, out.shape[0] + 254) >> 7), np.uint32)
    table = signed_bytes(np.float32(c), out.shape[0])
    done = 0
    while done < out.shape[0]:
        p = p0 + done
        size = min(n - (p & (n - 1)), out.shape[0] - done)
        columns_of(column, k, p >> tile[2], tile, tile[2])
        signs = _signs(words, p, size, tile)
        _column_signs(signs, p >> 7 << 2 & ((n >> 5) - 1), np.uint32(column[0]))
        target = floats_of(wide, out[done : done + size])
        add_signs(target, as_floats(wide, base[done : done + size]), signs, p & 127, np.float32(c), table)
        put_floats(out[done : done + size], target)
        done += size


@kernel
def combine(out: Any, base: Any, p0: int, coefficients: Any, tile: Any) -> None:
    """out[i] = base[i] + sum_k coefficients[k] * z_k[p0 + i]; both float32, or both the bits of bfloat16 numbers."""
    n = 1 << tile[2]
    sums, wide = np.empty(n, np.float32), np.empty(n, np.float32)
    words = np.empty(SCRATCH * (n >> 7), np.uint32)
    columns = np.empty(coefficients.shape[0], np.uint16)
    done = 0
    while done < out.shape[0]:
        p = p0 + done
        start = p & (n - 1)
        size = min(n - start, out.shape[0] - done)
        bits = _width(start + size)
        folded = sums[: 1 << bits]
        columns_of(columns, 0, p >> tile[2], tile, bits)
        _scatter(folded, columns, coefficients, bits < tile[2])
        walsh_hadamard(folded)
        run = as_floats(wide, base[done : done + size])
        target = floats_of(wide, out[done : done + size])
        add_flipped(target, run, folded[start : start + size], _signs(words, p, size, tile), p & 127)
        put_floats(out[done : done + size], target)
        done += size


@kernel
def project(sums: Any, delta: Any, p0: int, tile: Any) -> None:
    """sums float64 [K] += sum_i delta[i] * z_k[p0 + i]; float32 within a tile, float64 over tiles, in order of position.

    delta is float32, or the bits of bfloat16 numbers.
    """
    n = 1 << tile[2]
    values, wide = np.empty(n, np.float32), np.empty(n, np.float32)
    words = np.empty(SCRATCH * (n >> 7), np.uint32)
    columns = np.empty(sums.shape[0], np.uint16)
    done = 0
    while done < delta.shape[0]:
        p = p0 + done
        start = p & (n - 1)
        size = min(n - start, delta.shape[0] - done)
        bits = _width(start + size)
        width = 1 << bits
        values[:start] = np.float32(0.0)
        run = as_floats(wide, delta[done : done + size])
        copy_flipped(values[start : start + size], run, _signs(words, p, size, tile), p & 127)
        values[start + size : width] = np.float32(0.0)
        walsh_hadamard(values[:width])
        columns_of(columns, 0, p >> tile[2], tile, bits)
        for k in range(columns.shape[0]):
            sums[k] += np.float64(values[columns[k]])
        done += size


@kernel
def columns_of(columns: Any, first: int, number: int, tile: Any, bits: int) -> None:
    """columns[j] = pi_t(first + j) mod 2^bits, as uint16; t = number."""
    words = random_words(np.empty(SCRATCH, np.uint32), number, 1, 0, COLUMNS, tile[0], tile[1])
    mask, fold = np.uint16((1 << tile[2]) - 1), np.uint16((1 << bits) - 1)
    shift0, shift1, shift2 = np.uint16(tile[3]), np.uint16(tile[4]), np.uint16(tile[5])
    odd0, odd1, odd2 = np.uint16(words[0] | 1), np.uint16(words[1] | 1), np.uint16(words[2] | 1)
    add1, add2 = np.uint16(words[1] >> 16), np.uint16(words[2] >> 16)
    add0 = np.uint16((words[3] + first) * odd0 + (words[0] >> 16))  # so that the first round starts from j itself
    for j in range(columns.shape[0]):
        x = permute16(j, odd0, add0, shift0, mask)
        x = permute16(x, odd1, add1, shift1, mask)
        columns[j] = permute16(x, odd2, add2, shift2, mask) & fold


@kernel
def _scatter(sums: Any, columns: Any, coefficients: Any, folded: bool) -> None:
    """sums[c] = the coefficients of the seeds with column c; seeds meet in a column only if columns are `folded`."""
    if folded or columns.shape[0] < sums.shape[0]:
        sums[:] = np.float32(0.0)
    if folded:
        for k in range(columns.shape[0]):
            sums[columns[k]] += coefficients[k]
    else:
        for k in range(columns.shape[0]):
            sums[columns[k]] = coefficients[k]


@kernel
def _signs(words: Any, p: int, size: int, tile: Any) -> Any:
    """The words of D from the block of position p to that of p + size - 1: fills and returns a part of `words`."""
    first, last = p >> 7, (p + size + 127) >> 7
    return random_words(words, first, last - first, 0, SIGNS, tile[0], tile[1])


@kernel
def _column_signs(words: Any, first: int, column: Any) -> None:
    """Flip in `words` the bits where the Walsh-Hadamard column is -1; words[0] is word `first` of its tile."""
    low = np.uint32(0)
    for q in range(5):
        if column >> np.uint32(q) & np.uint32(1):
            low ^= MASKS[q]
    high = np.uint32(column >> np.uint32(5))
    for j in range(words.shape[0]):
        parity = np.uint32(np.uint32(j + first) & high)
        parity ^= parity >> np.uint32(8)
        parity ^= parity >> np.uint32(4)
        parity ^= parity >> np.uint32(2)
        parity ^= parity >> np.uint32(1)
        words[j] ^= np.uint32(low ^ np.uint32(-np.int32(parity & np.uint32(1))))


@kernel
def _width(end: int) -> int:
    """The smallest b >= SMALLEST with 2^b >= end."""
    bits = SMALLEST
    while 1 << bits < end:
        bits += 1
    return bits
