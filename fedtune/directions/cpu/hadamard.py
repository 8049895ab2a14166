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
from fedtune.directions.cpu.compiled import kernel
from fedtune.directions.cpu.philox import SCRATCH, random_words
from fedtune.directions.cpu.signs import add_signs, copy_unless_same, flip
from fedtune.directions.cpu.transform import TURN, walsh_hadamard

POWERS = (np.uint32(1) << np.arange(17, dtype=np.uint32)).astype(np.uint32)
# Bit i of mask q is bit q of i, so the signs of column c over 32 positions are the xor of the masks of its set bits.
MASKS = np.array([0xAAAAAAAA, 0xCCCCCCCC, 0xF0F0F0F0, 0xFF00FF00, 0xFFFF0000], dtype=np.uint32)


@kernel
def add(out: Any, base: Any, p0: int, k: int, c: Any, tile: Any) -> None:
    """out[i] = base[i] + c * z_k[p0 + i], from sign bits alone."""
    n = 1 << tile[2]
    column = np.empty(1, np.uint32)
    words = np.empty(SCRATCH * (min(n, out.shape[0] + 254) >> 7), np.uint32)
    done = 0
    while done < out.shape[0]:
        p = p0 + done
        size = min(n - (p & (n - 1)), out.shape[0] - done)
        run = out[done : done + size]
        copy_unless_same(run, base[done : done + size])
        columns_of(column, k, p >> tile[2], tile, tile[2], 0)
        signs = _signs(words, p, size, tile)
        _column_signs(signs, p >> 7 << 2 & ((n >> 5) - 1), column[0])
        add_signs(run, signs, p & 127, np.float32(c))
        done += size


@kernel
def combine(out: Any, base: Any, p0: int, coefficients: Any, tile: Any) -> None:
    """out[i] = base[i] + sum_k coefficients[k] * z_k[p0 + i]."""
    n = 1 << tile[2]
    sums, spare = np.empty(n, np.float32), np.empty(n, np.float32)
    words = np.empty(SCRATCH * (n >> 7), np.uint32)
    columns = np.empty(coefficients.shape[0], np.uint32)
    done = 0
    while done < out.shape[0]:
        p = p0 + done
        start = p & (n - 1)
        size = min(n - start, out.shape[0] - done)
        bits = _width(start + size)
        folded = sums[: 1 << bits]
        folded[:] = np.float32(0.0)
        columns_of(columns, 0, p >> tile[2], tile, bits, TURN)
        for k in range(columns.shape[0]):
            folded[columns[k]] += coefficients[k]
        walsh_hadamard(folded, spare[: 1 << bits])
        part = folded[start : start + size]
        flip(part, _signs(words, p, size, tile), p & 127)
        run = out[done : done + size]
        copy_unless_same(run, base[done : done + size])
        for i in range(size):
            run[i] += part[i]
        done += size


@kernel
def project(sums: Any, delta: Any, p0: int, tile: Any) -> None:
    """sums float64 [K] += sum_i delta[i] * z_k[p0 + i]; float32 within a tile, float64 over tiles, in order of position."""
    n = 1 << tile[2]
    values, spare = np.empty(n, np.float32), np.empty(n, np.float32)
    words = np.empty(SCRATCH * (n >> 7), np.uint32)
    columns = np.empty(sums.shape[0], np.uint32)
    done = 0
    while done < delta.shape[0]:
        p = p0 + done
        start = p & (n - 1)
        size = min(n - start, delta.shape[0] - done)
        bits = _width(start + size)
        width = 1 << bits
        values[:start] = np.float32(0.0)
        values[start : start + size] = delta[done : done + size]
        values[start + size : width] = np.float32(0.0)
        flip(values[start : start + size], _signs(words, p, size, tile), p & 127)
        walsh_hadamard(values[:width], spare[:width])
        columns_of(columns, 0, p >> tile[2], tile, bits, bits - TURN)
        for k in range(columns.shape[0]):
            sums[k] += np.float64(values[columns[k]])
        done += size


@kernel
def columns_of(columns: Any, first: int, number: int, tile: Any, bits: int, turn: int) -> None:
    """columns[j] = pi_t(first + j) mod 2^bits, then rotated left by `turn` bits; t = number.

    Numbers have 16 bits at most, so x >> s is (x * 2^(16 - s)) >> 16, which keeps the loop in 32-bit vector lanes: a shift
    by a variable amount would be done in 64. (The powers are read from memory, or LLVM makes shifts of them again.)
    """
    words = random_words(np.empty(SCRATCH, np.uint32), number, 1, 0, COLUMNS, tile[0], tile[1])
    mask, fold = np.uint32((1 << tile[2]) - 1), np.uint32((1 << bits) - 1)
    start = np.uint32(words[3] + np.uint32(first))
    odd0, odd1, odd2 = np.uint32(words[0] | 1), np.uint32(words[1] | 1), np.uint32(words[2] | 1)
    add0, add1, add2 = np.uint32(words[0] >> 16), np.uint32(words[1] >> 16), np.uint32(words[2] >> 16)
    shift0, shift1, shift2 = POWERS[16 - tile[3]], POWERS[16 - tile[4]], POWERS[16 - tile[5]]
    left, right = POWERS[turn], POWERS[16 - (bits - turn)]
    for j in range(columns.shape[0]):
        x = np.uint32(np.uint32(np.uint32(j) + start) & mask)
        x = np.uint32(np.uint32(np.uint32(x * odd0) + add0) & mask)
        x = np.uint32(x ^ np.uint32(np.uint32(x * shift0) >> np.uint32(16)))
        x = np.uint32(np.uint32(np.uint32(x * odd1) + add1) & mask)
        x = np.uint32(x ^ np.uint32(np.uint32(x * shift1) >> np.uint32(16)))
        x = np.uint32(np.uint32(np.uint32(x * odd2) + add2) & mask)
        x = np.uint32(np.uint32(x ^ np.uint32(np.uint32(x * shift2) >> np.uint32(16))) & fold)
        columns[j] = np.uint32(np.uint32(x * left) | np.uint32(np.uint32(x * right) >> np.uint32(16))) & fold


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
    """The smallest b >= TURN with 2^b >= end."""
    bits = TURN
    while 1 << bits < end:
        bits += 1
    return bits
