"""Factors of family lowrank on the CPU: normals laid out as rows of a matrix, and the sum of their outer products.

A factor row holds the normals of `cpu/gaussian.py` from a position on, in a counter domain of its own (see counters.py).
`key` is int64 [2], the key words of the pool.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedtune.directions.cpu.compiled import kernel
from fedtune.directions.cpu.gaussian import blocks_of, interleave, normal_planes, scratch
from fedtune.directions.cpu.signs import copy_unless_same
from fedtune.directions.cpu.stretch import STRETCH, begin, seed_words


@kernel
def fill(rows: Any, p0: int, stride: int, seeds: Any, scales: Any, purpose: int, key: Any) -> None:
    """rows[q * r + j, i] = scales[q] * the normal of seed seeds[q] at position p0 + j * stride + i.

    rows float32 [len(seeds) * r, n], seeds int64, scales float32 [len(seeds)].
    """
    tables, words, planes, normals = scratch()
    rank = rows.shape[0] // seeds.shape[0]
    for row in range(rows.shape[0]):
        q, first = row // rank, p0 + (row % rank) * stride
        done = 0
        while done < rows.shape[1]:
            p = first + done
            size = min(STRETCH - p % STRETCH, rows.shape[1] - done)
            block, count = blocks_of(p, size)
            begin(tables, block, count, purpose, key)
            seed_words(words, tables, block, count, seeds[q], key)
            normal_planes(planes, words, count)
            interleave(normals, planes, count)
            z = normals[p & 3 : (p & 3) + size]
            part = rows[row, done : done + size]
            for i in range(size):
                part[i] = scales[q] * z[i]
            done += size


@kernel
def add_outer(out: Any, base: Any, left: Any, right: Any, c: Any) -> None:
    """out[i, :] = base[i, :] + c * sum_j left[j, i] * right[j, :], in float32, the sum first, j ascending; out may be base."""
    scale = np.float32(c)
    z = np.empty(out.shape[1], np.float32)
    for i in range(out.shape[0]):
        z[:] = np.float32(0.0)
        for j in range(left.shape[0]):
            factor, row = left[j, i], right[j]
            for x in range(z.shape[0]):
                z[x] += factor * row[x]
        run = out[i]
        copy_unless_same(run, base[i])
        for x in range(z.shape[0]):
            run[x] += scale * z[x]
