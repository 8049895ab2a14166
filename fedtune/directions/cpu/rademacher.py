"""Family rademacher on the CPU: an independent random sign for every seed and position, 128 from each Philox block.

Runs are worked off in stretches of 4096 positions that start at multiples of 4096, so the order of every sum is fixed by
the positions. `key` is int64 [2], the key words of the pool.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedtune.directions.counters import RADEMACHER
from fedtune.directions.cpu.compiled import kernel
from fedtune.directions.cpu.philox import SCRATCH, random_words
from fedtune.directions.cpu.signs import add_signs, copy_unless_same, signed_bytes, signed_sum

STRETCH = 4096


@kernel
def add(out: Any, base: Any, p0: int, k: int, c: Any, key: Any) -> None:
    """out[i] = base[i] + c * z_k[p0 + i]."""
    words = np.empty(SCRATCH * (STRETCH >> 7), np.uint32)
    table = signed_bytes(np.float32(c), out.shape[0])
    done = 0
    while done < out.shape[0]:
        p = p0 + done
        size = min(STRETCH - p % STRETCH, out.shape[0] - done)
        signs = _signs(words, p, size, k, key)
        add_signs(out[done : done + size], base[done : done + size], signs, p & 127, np.float32(c), table)
        done += size


@kernel
def combine(out: Any, base: Any, p0: int, coefficients: Any, key: Any) -> None:
    """out[i] = base[i] + sum_k coefficients[k] * z_k[p0 + i]; seeds with coefficient 0 cost nothing."""
    words = np.empty(SCRATCH * (STRETCH >> 7), np.uint32)
    sums, no_table = np.empty(STRETCH, np.float32), np.empty(0, np.float32)
    done = 0
    while done < out.shape[0]:
        p = p0 + done
        size = min(STRETCH - p % STRETCH, out.shape[0] - done)
        part = sums[:size]
        part[:] = np.float32(0.0)
        for k in range(coefficients.shape[0]):
            if coefficients[k] != 0.0:
                add_signs(part, part, _signs(words, p, size, k, key), p & 127, coefficients[k], no_table)
        run = out[done : done + size]
        copy_unless_same(run, base[done : done + size])
        for i in range(size):
            run[i] += part[i]
        done += size


@kernel
def project(sums: Any, delta: Any, p0: int, wanted: Any, key: Any) -> None:
    """sums[k] += sum_i delta[i] * z_k[p0 + i] in float64, for every k in `wanted` (int64, the seeds' numbers)."""
    words = np.empty(SCRATCH * (STRETCH >> 7), np.uint32)
    lanes = np.empty(32, np.float64)
    done = 0
    while done < delta.shape[0]:
        p = p0 + done
        size = min(STRETCH - p % STRETCH, delta.shape[0] - done)
        for k in wanted:
            sums[k] += signed_sum(delta[done : done + size], _signs(words, p, size, k, key), p & 127, lanes)
        done += size


@kernel
def _signs(words: Any, p: int, size: int, k: int, key: Any) -> Any:
    """The words of z_k from the block of position p to that of p + size - 1: fills and returns a part of `words`."""
    first, last = p >> 7, (p + size + 127) >> 7
    return random_words(words, first, last - first, k, RADEMACHER, key[0], key[1])
