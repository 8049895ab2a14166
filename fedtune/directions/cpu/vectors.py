"""Vectors of numbers inside an intrinsic: arithmetic written with Python's operators that becomes LLVM instructions.

A `Vectors` holds several vectors side by side, and every operation is done to all of them in turn: a processor then finds
independent work next to each other while it waits for a long chain of dependent operations. LLVM's own vectoriser works
such a chain off one vector at a time, which takes up to twice as long. Nothing is fused or reordered: each operator is one
IEEE operation, and a processor with shorter vectors splits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

INT32, INT64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


@dataclass(frozen=True)
class Vectors:
    """Vectors of one type, integers (without sign unless a method says otherwise) or floats; a constant stands for all."""

    builder: Any
    each: Sequence[Any]

    def __add__(self, other: Any) -> Vectors:
        return self._by("fadd" if self._floats else "add", other)

    def __sub__(self, other: Any) -> Vectors:
        return self._by("fsub" if self._floats else "sub", other)

    def __mul__(self, other: Any) -> Vectors:
        return self._by("fmul" if self._floats else "mul", other)

    def __xor__(self, other: Any) -> Vectors:
        return self._by("xor", other)

    def __and__(self, other: Any) -> Vectors:
        return self._by("and_", other)

    def __lshift__(self, bits: int) -> Vectors:
        return self._by("shl", bits)

    def __rshift__(self, bits: int) -> Vectors:
        return self._by("lshr", bits)

    def signed_shift(self, bits: int) -> Vectors:
        """Shift to the right that repeats the sign bit."""
        return self._by("ashr", bits)

    def as_bits(self) -> Vectors:
        """The bits of floats as 32-bit integers."""
        return self._to("bitcast", INT32)

    def as_floats(self) -> Vectors:
        """The floats with these bits."""
        return self._to("bitcast", FLOAT)

    def rounded(self, signed: bool) -> Vectors:
        """The nearest floats to 32-bit integers."""
        return self._to("sitofp" if signed else "uitofp", FLOAT)

    def root(self) -> Vectors:
        """The correctly rounded square roots."""
        kind = self.each[0].type
        name = f"llvm.sqrt.v{kind.count}f32"
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(kind, [kind]), name)
        return Vectors(self.builder, [self.builder.call(function, [x]) for x in self.each])

    def choose(self, where_set: Vectors, otherwise: Vectors) -> Vectors:
        """By the highest bit of these integers."""
        builder, zero = self.builder, ir.Constant(self.each[0].type, None)
        chosen = zip(self.each, where_set.each, otherwise.each, strict=True)
        return Vectors(builder, [builder.select(builder.icmp_signed("<", x, zero), a, b) for x, a, b in chosen])

    def store(self, pointers: Sequence[Any]) -> None:
        """One vector at each place."""
        for x, pointer in zip(self.each, pointers, strict=True):
            self.builder.store(x, pointer, align=4)

    @property
    def _floats(self) -> bool:
        return bool(self.each[0].type.element == FLOAT)

    def _by(self, instruction: str, other: Any) -> Vectors:
        kind = self.each[0].type
        others = other.each if isinstance(other, Vectors) else [ir.Constant(kind, [other] * kind.count)] * len(self.each)
        build = getattr(self.builder, instruction)
        return Vectors(self.builder, [build(a, b) for a, b in zip(self.each, others, strict=True)])

    def _to(self, instruction: str, element: Any) -> Vectors:
        build = getattr(self.builder, instruction)
        return Vectors(self.builder, [build(x, ir.VectorType(element, x.type.count)) for x in self.each])


def load(builder: Any, pointers: Sequence[Any]) -> Vectors:
    """One vector from each place."""
    return Vectors(builder, [builder.load(pointer, align=4) for pointer in pointers])


def repeat(builder: Any, number: Any, lanes: int, count: int) -> Vectors:
    """`count` vectors with `number` in every lane."""
    kind = ir.VectorType(number.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(INT32, 0))
    zeros = ir.Constant(ir.VectorType(INT32, lanes), None)
    return Vectors(builder, [builder.shuffle_vector(first, first, zeros)] * count)


def places(context: Any, builder: Any, kind: Any, array: Any, starts: Sequence[Any], lanes: int) -> list[Any]:
    """Pointers to vectors of `lanes` elements at the flat indices `starts` (int64) of a contiguous array."""
    data = context.make_array(kind)(context, builder, array).data
    vector = ir.VectorType(data.type.pointee, lanes).as_pointer()
    return [builder.bitcast(builder.gep(data, [start]), vector) for start in starts]
