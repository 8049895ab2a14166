"""Run as a script: compile every Triton kernel for an NVIDIA GPU (none is needed), and print what may not be in the code."""

from __future__ import annotations

import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedtune.directions.counters import column_shifts
from fedtune.directions.gpu import factors, gaussian, hadamard, rademacher, stretch
from fedtune.directions.gpu.compiled import WARPS

TYPES = {"p0": "i64", "c": "fp32", "c1": "fp32", "c2": "fp32", "coefficients": "*fp32", "scales": "*fp32", "seeds": "*i32"}
TYPES |= {"partial": "*fp64", "sums": "*fp64"}
TENSORS = ("out", "base", "delta", "weight")


def compile_for(capability: int, function: object, dtype: str, bits: int) -> str:
    """The PTX of a kernel for tensors of `dtype` and tiles of 2^bits."""
    given = dict(zip(("BITS", "S0", "S1", "S2", "WIDTH"), (bits, *column_shifts(bits), 64), strict=True))
    names = function.arg_names  # type: ignore[attr-defined]
    constants = {name: given[name] for name in names if name in given}
    types = {name: "constexpr" if name in given else TYPES.get(name, "i32") for name in names}
    types.update({name: f"*{dtype}" for name in TENSORS if name in names})
    source = ASTSource(fn=function, signature=types, constexprs=constants)
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return str(compiled.asm["ptx"])


def bad_in(ptx: str) -> list[str]:
    """Fused, flushing, approximate and unordered instructions."""
    return sorted(set(re.findall(r"\bfma\.\S+|\S+\.ftz\S*|\S+\.approx\S*|\batom\.\S+|\bred\.\S+", ptx)))


if __name__ == "__main__":
    target = int(sys.argv[1])
    for module in (hadamard, rademacher, gaussian):
        for name in ("add", "move_and_add", "combine", "project"):
            for dtype, bits in [("fp32", 12)] + ([("bf16", 16)] if module is hadamard else []):
                ptx = compile_for(target, getattr(module, name), dtype, bits)
                print(module.__name__, name, dtype, bits, *bad_in(ptx))
    print(factors.__name__, "fill_rows", "fp32", 0, *bad_in(compile_for(target, factors.fill_rows, "fp32", 12)))
    compile_for(target, stretch.join, "fp32", 12)
