"""Which elements of a tensor a program works on, how they are read and rounded, and how the sums of programs are joined.

A program owns a stretch of positions; elements that the tensor does not have there are read as zero and not written.
"""

from __future__ import annotations

import triton.language as tl

from fedtune.directions.gpu.compiled import device_function, kernel
from fedtune.directions.gpu.philox import STRETCH


@device_function
def start_of(number: tl.tensor, p0: tl.tensor) -> tl.tensor:
    """int64: the first position of stretch `number`, counted from the one that has position p0."""
    return ((p0 >> 12) + number).to(tl.int64) * STRETCH


@device_function
def read(tensor: tl.tensor, start: tl.tensor, p0: tl.tensor, length: tl.tensor) -> tl.tensor:
    """float32 [STRETCH]: the elements at the positions from `start` on."""
    index = start - p0 + tl.arange(0, STRETCH)
    return tl.load(tensor + index, mask=(index >= 0) & (index < length), other=0.0).to(tl.float32)


@device_function
def write(tensor: tl.tensor, values: tl.tensor, start: tl.tensor, p0: tl.tensor, length: tl.tensor) -> None:
    """Store float32 [STRETCH] in the tensor's own type, rounded to nearest, ties to even."""
    index = start - p0 + tl.arange(0, STRETCH)
    tl.store(tensor + index, rounded(tensor, values), mask=(index >= 0) & (index < length))


@device_function
def rounded(tensor: tl.tensor, values: tl.tensor) -> tl.tensor:
    """float32 values in the type of the tensor's elements."""
    if tensor.dtype.element_ty == tl.bfloat16:
        values = _bfloat16(values)
    return values.to(tensor.dtype.element_ty)


@device_function
def _bfloat16(values: tl.tensor) -> tl.tensor:
    """Rounded by integers, since Triton's interpreter cuts off instead: a carry may go from the fraction to the exponent."""
    bits = values.to(tl.uint32, bitcast=True)
    half = 0x7FFF + ((bits >> 16) & 1)
    rounded = tl.where(values == values, (bits + half) >> 16, 0x7FC0)  # noqa: PLR0124 - not a NaN
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@kernel
def join(sums: tl.tensor, partial: tl.tensor, groups: tl.tensor, size: tl.tensor, WIDTH: tl.constexpr) -> None:
    """sums[k] = sum over g of partial[g, k] (float64 [groups, size]), g ascending."""
    k = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for group in range(groups):
        total += tl.load(partial + group * size + k, mask=k < size, other=0.0)
    tl.store(sums + k, total, mask=k < size)
