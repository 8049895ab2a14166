"""Run as a script with TRITON_INTERPRET=1: the Triton kernels on the calls saved in one file, their results in another.

A process of its own, since Triton decides when it is imported whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedtune.directions import Pool, make_family
from fedtune.directions.backends import Backend
from fedtune.directions.choice import make_backend
from fedtune.layout import Layout


@dataclass(frozen=True)
class Call:
    """One operation on one tensor: `argument` is (k, c), two of them, the coefficients or `wanted`."""

    pool: Pool
    operation: str
    base: torch.Tensor
    p0: int
    argument: Any
    strided: bool = False  # the tensor that is written is a strided view


def perform(backend: Backend, call: Call) -> Any:
    """The tensor that `add` or `combine` writes, both that `move_and_add` writes, or the sums of `project`."""
    if call.operation == "project":
        sums = np.zeros(call.pool.size)
        backend.project(sums, call.base, call.p0, call.argument)
        return sums
    out = torch.zeros(*call.base.shape, 2, dtype=call.base.dtype)[..., 0] if call.strided else torch.zeros_like(call.base)
    if call.operation == "add":
        backend.add(out, call.base, call.p0, *call.argument)
    elif call.operation == "move_and_add":
        weight = call.base.clone()
        backend.move_and_add(weight, out, call.p0, *call.argument)
        return torch.stack([weight, out])
    else:
        backend.combine(out, call.base, call.p0, call.argument)
    return out


def backend_of(call: Call, kernels: str) -> Backend:
    return make_backend(kernels, make_family(call.pool, Layout.from_shapes([("a", tuple(call.base.shape))])))


if __name__ == "__main__":
    from fedtune.directions.gpu import backend as gpu

    gpu.MOST_GROUPS = 2  # so that three stretches make two groups, the second with a stretch that no element has
    gpu.SEEDS = 4  # so that six seeds are more than a program has
    calls = torch.load(sys.argv[1], weights_only=False)
    torch.save({name: perform(backend_of(call, "triton"), call) for name, call in calls.items()}, sys.argv[2])
