"""The fast Walsh-Hadamard transform of one tile, in place and in natural order, eight floats to a vector.

LLVM vectorises a butterfly over views of one array only behind checks that they do not overlap, and not at all where its
distance is below a vector's length. So the butterflies on eight vectors are written out as LLVM vectors here, which a
processor with shorter ones splits: eight times three bits of the index while the values stay in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types

from fedtune.directions.cpu.compiled import instructions, kernel

SMALLEST = 6
"""log2 of the shortest tile."""

LANES = 8
INT64 = ir.IntType(64)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
BITS = ir.VectorType(ir.IntType(32), LANES)


@kernel
def walsh_hadamard(x: Any) -> None:
    """x = H x, H[i, c] = (-1)^popcount(i & c); x is float32 [2^b], b >= SMALLEST.

    The bits of the index are taken from the highest to the lowest, three at a time, but for the highest below 64 * 8.
    """
    n = x.shape[0]
    h = n
    while h >= 512:
        h >>= 3
        for i in range(0, n, 8 * h):
            for j in range(i, i + h, LANES):
                _eight(x, j, h)
    if h == 256:
        for i in range(0, n, 256):
            for j in range(i, i + 64, LANES):
                _four(x, j, 64)
    elif h == 128:
        for i in range(0, n, 128):
            for j in range(i, i + 64, LANES):
                _two(x, j, 64)
    for i in range(0, n, 64):
        _sixty_four(x, i, LANES)


def _on_vectors(count: int, within: bool) -> Any:
    """The intrinsic f(x, i, h): butterflies on the vectors at x[i], x[i + h], x[i + 2 h] .. (`count` of them), all with
    all; with `within` also on the elements of each vector."""

    @instructions
    def butterflies(typing: Any, x: Any, i: Any, h: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array, first, step = arguments
            data = context.make_array(signature.args[0])(context, builder, array).data
            places = [builder.add(first, builder.mul(step, ir.Constant(INT64, m))) for m in range(count)]
            pointers = [builder.bitcast(builder.gep(data, [place]), FLOATS.as_pointer()) for place in places]
            vectors = _between(builder, [builder.load(pointer, align=4) for pointer in pointers])
            for vector, pointer in zip(vectors, pointers, strict=True):
                builder.store(_inside(builder, vector) if within else vector, pointer, align=4)
            return context.get_dummy_value()

        return types.void(x, types.int64, types.int64), build

    return butterflies


def _between(builder: Any, vectors: Sequence[Any]) -> Sequence[Any]:
    """The transform over the vectors, for each of their elements."""
    distance = 1
    while distance < len(vectors):
        pairs = [(vectors[i & ~distance], vectors[i | distance]) for i in range(len(vectors))]
        vectors = [builder.fsub(a, b) if i & distance else builder.fadd(a, b) for i, (a, b) in enumerate(pairs)]
        distance *= 2
    return vectors


def _inside(builder: Any, vector: Any) -> Any:
    """The transform over the elements of a vector: three times, the neighbours at a distance plus or minus the elements."""
    for distance in (1, 2, 4):
        other = builder.shuffle_vector(vector, vector, ir.Constant(BITS, [i ^ distance for i in range(LANES)]))
        minus = ir.Constant(BITS, [1 << 31 if i & distance else 0 for i in range(LANES)])
        signed = builder.bitcast(builder.xor(builder.bitcast(vector, BITS), minus), FLOATS)
        vector = builder.fadd(other, signed)
    return vector


_two, _four, _eight, _sixty_four = _on_vectors(2, False), _on_vectors(4, False), _on_vectors(8, False), _on_vectors(8, True)
