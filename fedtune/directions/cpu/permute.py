"""One round of the permutation of family hadamard's columns, in 16-bit arithmetic.

numba computes with integers of 64 bits whatever their type, and LLVM narrows a loop to the bits that count only where
nothing is shifted right. Written in 16 bits the round runs on sixteen numbers to a vector of 256 bits.
"""

from __future__ import annotations

from typing import Any

from numba import types

from fedtune.directions.cpu.compiled import instructions


@instructions
def permute16(typing: Any, x: Any, odd: Any, add: Any, shift: Any, mask: Any) -> Any:
    """uint16: y ^ (y >> shift) with y = (x * odd + add) & mask; x any integer, of which the low 16 bits count, the others
    uint16; shift below 16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, odd, add, shift, mask = arguments
        low = x if x.type == odd.type else builder.trunc(x, odd.type)
        y = builder.and_(builder.add(builder.mul(low, odd), add), mask)
        return builder.xor(y, builder.lshr(y, shift))

    return types.uint16(x, types.uint16, types.uint16, types.uint16, types.uint16), build
