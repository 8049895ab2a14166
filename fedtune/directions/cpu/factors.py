"""Factors of family lowrank on the CPU: normals laid out as rows of a matrix, and the sum of their outer products.

A factor row holds the normals of `cpu/gaussian.py` from a position on, in a counter domain of its own (see counters.py).
`key` is int64 [2], the key words of the pool.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from fedtune.directions.cpu.compiled import instructions, kernel
from fedtune.directions.cpu.gaussian import blocks_of, interleave, normal_planes, scratch
from fedtune.directions.cpu.signs import copy_unless_same
from fedtune.directions.cpu.stretch import STRETCH, begin, seed_words
from fedtune.directions.cpu.vectors import INT64, load, places, repeat

WIDTH = 8  # floats in a vector; a processor with shorter ones splits it
PART = 32  # elements of a row worked on at a time: independent vectors side by side


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
    if left.shape[0] == 1:
        for i in range(out.shape[0]):
            _add_row(out[i], base[i], right[0], left[0, i], scale)
        return
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


@kernel
def _add_row(out: Any, base: Any, row: Any, factor: Any, scale: Any) -> None:
    """out = base + scale * (0 + factor * row), what `add_outer` does for one row of a product of rank 1."""
    whole = out.shape[0] // PART
    for j in range(whole):
        _add_part(out, base, row, PART * j, factor, scale)
    for x in range(PART * whole, out.shape[0]):
        out[x] = base[x] + scale * (np.float32(0.0) + factor * row[x])


@instructions
def _add_part(typing: Any, out: Any, base: Any, row: Any, i: Any, factor: Any, scale: Any) -> Any:
    """f(out, base, row, i, factor, scale): the PART elements of `_add_row` from i on, whichever arrays are the same."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, (target, source, numbers, start, by, times) = signature.args, arguments
        starts = [builder.add(start, ir.Constant(INT64, lane)) for lane in range(0, PART, WIDTH)]
        values = load(builder, places(context, builder, kinds[2], numbers, starts, WIDTH))
        z = values * repeat(builder, by, WIDTH, len(starts)) + 0.0
        before = load(builder, places(context, builder, kinds[1], source, starts, WIDTH))
        after = before + z * repeat(builder, times, WIDTH, len(starts))
        after.store(places(context, builder, kinds[0], target, starts, WIDTH))
        return context.get_dummy_value()

    return types.void(out, base, row, types.int64, types.float32, types.float32), build
