"""How a kernel is compiled for the GPU: by Triton, without fused multiply-adds, on the device of the tensors.

Triton decides when it is imported whether it compiles or, with TRITON_INTERPRET=1, runs kernels on CPU tensors in numpy;
the tests use the latter. Arguments that change from call to call are named in VARYING, or 1 and multiples of 16 would be
compiled anew. `p0` and `length` are not: that they are multiples of 16 makes wide loads possible.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton

from fedtune.errors import DirectionsError

Function = TypeVar("Function", bound=Callable[..., Any])

VARYING = ("k", "c", "count", "size", "groups", "per_group", "stride", "rank", "purpose", "key0", "key1")
WARPS = 8


def device_function(function: Function) -> Function:
    """A function that kernels call."""
    return triton.jit(function)  # type: ignore[no-any-return]


def kernel(function: Function) -> Function:
    """A function that `launch` runs."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in VARYING])  # type: ignore[no-any-return]


def launch(function: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: int) -> None:
    """Run a kernel with `grid` programs on `device`; products and sums are rounded one by one, as on the CPU.

    Raises:
        DirectionsError: not a CUDA device, and kernels are not interpreted.
    """
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise DirectionsError(
            f"Triton kernels work on tensors of a CUDA device, not on {device}: use kernels 'torch', or none to let the "
            "tensors' device choose.",
            device=str(device),
        )
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        function[grid](*arguments, **constants, num_warps=WARPS, enable_fp_fusion=False)


def signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word: every key has the same type, so a kernel is compiled once for all."""
    return word - 2**32 if word >= 2**31 else word
