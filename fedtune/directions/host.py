"""The kernels of the CPU on tensors of any dtype, device and memory layout, cut into runs for a family.

float32 CPU tensors are worked on in place, and bfloat16 ones by a family that `takes_bits`. All others (strided views, other
devices, 16-bit weights of another family) go through a small float32 scratch, chunk by chunk, and are rounded to their own
type once. Pieces and chunks start at multiples of the largest tile, and those of a projection depend on the tensor's size
alone, so threads, dtype and device change no value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.directions.backends import Backend, Move
from fedtune.directions.base import F32, F64, Bools, Family
from fedtune.directions.cpu.bfloat16 import narrow, widen
from fedtune.directions.threads import PIECE, ordered_map
from fedtune.layout import ALIGN

CACHED = ALIGN // 2  # elements of two float32 tensors, 256 KB together, that stay in cache between two kernels
CHUNK = ALIGN  # elements of the float32 scratch: 256 KB, which fits a core's second-level cache
MOST_PIECES = 64  # bounds the memory of the partial sums of a projection
PIECES_PER_THREAD = 4  # of an add or combine, whose pieces change no value

Run = Callable[[F32, F32, int], None]  # (out, base, p0): one contiguous run of a family's add or combine


class HostBackend(Backend):
    """A family's kernels on the CPU; in threads where a tensor is large and on the CPU."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def add(self, out: Tensor, base: Tensor, p0: int, k: int, c: float) -> None:
        for_pieces(partial(self._apply_piece, partial(self._add, k, c)), base, out, p0)

    def move_and_add(self, weight: Tensor, out: Tensor, p0: int, move: Move, add: Move) -> None:
        both = partial(self._move_and_add_piece, partial(self._add, *move), partial(self._add, *add))
        for_pieces(both, weight, out, p0)

    def combine(self, out: Tensor, base: Tensor, p0: int, coefficients: F32) -> None:
        for_pieces(partial(self._apply_piece, partial(self._combine, coefficients)), base, out, p0)

    def project(self, sums: F64, delta: Tensor, p0: int, wanted: Bools | None) -> None:
        for offset, (row,) in _rows(delta.detach()):
            pieces = [(row[a:b], p0 + offset + a) for a, b in _cut(len(row), MOST_PIECES)]
            each = ordered_map if row.is_cpu else map
            for part in each(partial(self._project_piece, wanted), pieces):
                sums += part

    def _add(self, k: int, c: float, out: F32, base: F32, p0: int) -> None:
        self.family.add(out, base, p0, k, c)

    def _combine(self, coefficients: F32, out: F32, base: F32, p0: int) -> None:
        self.family.combine(out, base, p0, coefficients)

    def _project_piece(self, wanted: Bools | None, piece: tuple[Tensor, int]) -> F64:
        delta, p0 = piece
        sums = np.zeros(self.family.pool.size)
        if arrays := self._arrays(delta):
            self.family.project(sums, arrays[0], p0, wanted)
            return sums
        scratch = torch.empty(min(CHUNK, len(delta)))
        for a in range(0, len(delta), CHUNK):
            part = scratch[: len(delta) - a]
            _load(part, delta[a : a + CHUNK])
            self.family.project(sums, as_array(part), p0 + a, wanted)
        return sums

    def _apply_piece(self, run: Run, piece: tuple[Tensor, Tensor, int]) -> None:
        base, out, p0 = piece
        if arrays := self._arrays(base, out):
            run(arrays[1], arrays[0], p0)
            return
        scratch = torch.empty(min(CHUNK, len(base)))
        for a in range(0, len(base), CHUNK):
            part = scratch[: len(base) - a]
            _load(part, base[a : a + CHUNK])
            values = as_array(part)
            run(values, values, p0 + a)
            _store(out[a : a + CHUNK], part)

    def _move_and_add_piece(self, move: Run, add: Run, piece: tuple[Tensor, Tensor, int]) -> None:
        """`move` in place, then `add` from there to the other tensor, by parts that stay in a core's cache."""
        weight, out, p0 = piece
        starts = range(0, len(weight), CACHED)
        if arrays := self._arrays(weight, out):
            moved, values = arrays
            for a in starts:
                move(moved[a : a + CACHED], moved[a : a + CACHED], p0 + a)
                add(values[a : a + CACHED], moved[a : a + CACHED], p0 + a)
            return
        scratch = torch.empty(min(CACHED, len(weight)))
        for a in starts:
            source, target = weight[a : a + CACHED], out[a : a + CACHED]
            part = scratch[: len(source)]
            values = as_array(part)
            for run, result in ((move, source), (add, target)):
                _load(part, source)
                run(values, values, p0 + a)
                _store(result, part)

    def _arrays(self, *tensors: Tensor) -> list[Any]:
        """What the family can work on in place: the memory of them all, float32 or bfloat16; empty if it cannot."""
        if all(map(is_direct, tensors)):
            return [as_array(tensor) for tensor in tensors]
        if self.family.takes_bits and all(map(is_bfloat16, tensors)):
            return [bits_of(tensor) for tensor in tensors]
        return []


def is_direct(tensor: Tensor) -> bool:
    """Whether a family can work on the tensor's own memory."""
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.layout is torch.strided and tensor.is_contiguous()


def is_bfloat16(tensor: Tensor) -> bool:
    """Whether it is one of the CPU, whose bits can be worked on in place."""
    return tensor.dtype is torch.bfloat16 and tensor.is_cpu and tensor.layout is torch.strided and tensor.is_contiguous()


def as_array(tensor: Tensor) -> Any:
    """The numpy view of a contiguous tensor of the CPU."""
    return tensor.numpy()


def bits_of(tensor: Tensor) -> Any:
    """The numpy view, uint16, of a tensor that `is_bfloat16`."""
    return as_array(tensor.view(torch.uint16))


def _load(part: Tensor, source: Tensor) -> None:
    """part (float32, direct) = source."""
    if is_bfloat16(source):
        widen(as_array(part), bits_of(source))
    else:
        part.copy_(source)


def _store(target: Tensor, part: Tensor) -> None:
    """target = part (float32, direct), rounded to nearest."""
    if is_bfloat16(target):
        narrow(bits_of(target), as_array(part))
    else:
        target.copy_(part)


def for_pieces(work: Callable[[tuple[Tensor, Tensor, int]], None], base: Tensor, out: Tensor, p0: int) -> None:
    """`work` on the pieces (base, out, position) of two tensors of one shape."""
    for offset, (source, target) in _rows(base.detach(), out.detach()):
        cuts = _cut(len(source), PIECES_PER_THREAD * torch.get_num_threads())
        pieces = [(source[a:b], target[a:b], p0 + offset + a) for a, b in cuts]
        each = ordered_map if source.is_cpu and target.is_cpu else map
        for _ in each(work, pieces):
            pass


def _rows(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """(offset, 1-D views) that cover tensors of one shape in the order of their elements: one row if all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        yield 0, tuple(t.view(-1) for t in tensors)
    elif tensors[0].dim() == 1:
        yield 0, tensors
    else:
        size = tensors[0][0].numel()
        for i in range(tensors[0].shape[0]):
            for offset, views in _rows(*(t[i] for t in tensors)):
                yield i * size + offset, views


def _cut(length: int, most: int) -> list[tuple[int, int]]:
    """The pieces of a row: at least PIECE long, at most `most`, starting at multiples of the largest tile."""
    per_piece = -(-length // most)
    size = max(PIECE, -(-per_piece // ALIGN) * ALIGN)
    return [(a, min(a + size, length)) for a in range(0, length, size)]
