"""Random signs, one bit a position, applied to runs of floats 32 at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from fedtune.directions.cpu.compiled import instructions, kernel
from fedtune.directions.cpu.vectors import INT32, INT64, Vectors, load, places, repeat

WIDTH = 8  # floats in a vector; a processor with shorter ones splits it
SIGN = 1 << 31
LONG = 1 << 14  # elements from which a table of signed numbers pays
LANES = (np.uint32(1) << np.arange(32, dtype=np.uint32)).astype(np.uint32)


@kernel
def copy_unless_same(out: Any, base: Any) -> None:
    """out = base; nothing where they are one array. The kernels then work in place: a loop over two arrays that may be
    one and the same is compiled to scalar code."""
    if out.ctypes.data != base.ctypes.data:
        for i in range(out.shape[0]):
            out[i] = base[i]


@kernel
def signed_bytes(c: Any, length: int) -> Any:
    """float32 [256 * 8]: for every byte, c with the signs of its bits; empty if `length` elements are too few to pay for it."""
    table = np.empty(2048 if length >= LONG else 0, np.float32)
    for i in range(table.shape[0]):
        table[i] = -c if i >> 3 >> (i & 7) & 1 else c
    return table


@kernel
def add_signs(out: Any, base: Any, words: Any, offset: int, c: Any, table: Any) -> None:
    """out[i] = base[i] - c where bit (offset + i) of the uint32 `words` is set, else base[i] + c; out may be base.

    `table` is signed_bytes(c, the length of the whole run).
    """
    count = out.shape[0]
    head = min(count, (32 - (offset & 31)) & 31)
    for i in range(head):
        bit = offset + i
        out[i] = base[i] + (-c if words[bit >> 5] & LANES[bit & 31] != 0 else c)
    first = (offset + head) >> 5
    whole = (count - head) >> 5
    if table.shape[0] > 0:
        for j in range(whole):
            _add_bytes(out, base, head + 32 * j, words[first + j], table)
    else:
        for j in range(whole):
            _add_word(out, base, head + 32 * j, words[first + j], c)
    done = head + 32 * whole
    for i in range(count - done):
        out[done + i] = base[done + i] + (-c if words[first + whole] & LANES[i] != 0 else c)


@kernel
def add_flipped(out: Any, base: Any, values: Any, words: Any, offset: int) -> None:
    """out[i] = base[i] - values[i] where bit (offset + i) of `words` is set, else base[i] + values[i]; out may be base."""
    count = values.shape[0]
    head = min(count, (32 - (offset & 31)) & 31)
    for i in range(head):
        bit = offset + i
        out[i] = base[i] + (-values[i] if words[bit >> 5] & LANES[bit & 31] != 0 else values[i])
    first = (offset + head) >> 5
    whole = (count - head) >> 5
    for j in range(whole):
        _add_flipped_word(out, base, values, head + 32 * j, words[first + j])
    done = head + 32 * whole
    for i in range(count - done):
        out[done + i] = base[done + i] + (-values[done + i] if words[first + whole] & LANES[i] != 0 else values[done + i])


@instructions
def _add_word(typing: Any, out: Any, base: Any, i: Any, word: Any, c: Any) -> Any:
    """f(out, base, i, word, c): the 32 elements from i on of `add_signs`, with the bits of one word."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, (target, source, start, bits, number) = signature.args, arguments
        starts = _starts(builder, start)
        values = repeat(builder, number, WIDTH, len(starts))
        before = load(builder, places(context, builder, kinds[1], source, starts, WIDTH))
        after = before + (values.as_bits() ^ _sign_bits(builder, bits)).as_floats()
        after.store(places(context, builder, kinds[0], target, starts, WIDTH))
        return context.get_dummy_value()

    return types.void(out, base, types.int64, types.uint32, types.float32), build


@instructions
def _add_bytes(typing: Any, out: Any, base: Any, i: Any, word: Any, table: Any) -> Any:
    """f(out, base, i, word, table): as `_add_word`, with the signed numbers of each byte read from the table."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, (target, source, start, bits, signed) = signature.args, arguments
        starts = _starts(builder, start)
        before = load(builder, places(context, builder, kinds[1], source, starts, WIDTH))
        added = load(builder, places(context, builder, kinds[4], signed, _of_each_byte(builder, bits), WIDTH))
        (before + added).store(places(context, builder, kinds[0], target, starts, WIDTH))
        return context.get_dummy_value()

    return types.void(out, base, types.int64, types.uint32, table), build


@instructions
def _add_flipped_word(typing: Any, out: Any, base: Any, values: Any, i: Any, word: Any) -> Any:
    """f(out, base, values, i, word): the 32 elements from i on of `add_flipped`, with the bits of one word."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, (target, source, numbers, start, bits) = signature.args, arguments
        starts = _starts(builder, start)
        added = load(builder, places(context, builder, kinds[2], numbers, starts, WIDTH))
        before = load(builder, places(context, builder, kinds[1], source, starts, WIDTH))
        after = before + (added.as_bits() ^ _sign_bits(builder, bits)).as_floats()
        after.store(places(context, builder, kinds[0], target, starts, WIDTH))
        return context.get_dummy_value()

    return types.void(out, base, values, types.int64, types.uint32), build


def _starts(builder: Any, start: Any) -> list[Any]:
    """The first elements of the vectors that cover 32 elements."""
    return [builder.add(start, ir.Constant(INT64, lane)) for lane in range(0, 32, WIDTH)]


def _of_each_byte(builder: Any, word: Any) -> list[Any]:
    """int64: where a table of 8 elements a byte has those of the four bytes of the word, lowest first."""
    wide = builder.zext(word, INT64)
    bytes_ = [builder.and_(builder.lshr(wide, ir.Constant(INT64, 8 * b)), ir.Constant(INT64, 255)) for b in range(4)]
    return [builder.shl(byte, ir.Constant(INT64, 3)) for byte in bytes_]


def _sign_bits(builder: Any, word: Any) -> Vectors:
    """Bit i of the word as the sign bit of lane i, of vectors that cover 32 elements."""
    kind = ir.VectorType(INT32, WIDTH)
    same = repeat(builder, word, WIDTH, 32 // WIDTH).each
    to_the_top = [ir.Constant(kind, [31 - (first + lane) for lane in range(WIDTH)]) for first in range(0, 32, WIDTH)]
    return Vectors(builder, [builder.shl(x, bits) for x, bits in zip(same, to_the_top, strict=True)]) & SIGN


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
