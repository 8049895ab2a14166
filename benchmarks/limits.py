"""What the machine itself can do: scaling and copying memory, multiplying matrices. Measured in the run that is judged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import Options, Row, alternate

ALMOST_ONE = 1.0 + 2.0**-20  # a factor that no library skips and that no repetition makes large


def weights(elements: int, device: torch.device) -> list[Tensor]:
    """float32 matrices of the sizes of a language model, `elements` (a multiple of 8192) in all: 2048 columns, four at
    least, each of 4 Mi elements at most."""
    count = max(4, elements >> 22)
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(elements // count // 2048, 2048, generator=generator) * 0.02).to(device) for _ in range(count)]


def scale(tensors: Sequence[Tensor]) -> None:
    """One read and one write of all the memory: the least that any change of the weights costs."""
    for tensor in tensors:
        tensor.mul_(ALMOST_ONE)


def rows(options: Options) -> list[Row]:
    """limits.scale, limits.copy and limits.gemm. Bytes count once for each read and once for each write."""
    device = options.device
    source = weights(options.elements, device)
    target = [torch.empty_like(tensor) for tensor in source]
    size = 256 if options.quick else 2048
    a, b = (torch.randn(size, size, device=device) for _ in range(2))

    def copy() -> None:
        for tensor, other in zip(source, target, strict=True):
            other.copy_(tensor)

    seconds = alternate({"scale": lambda: scale(source), "copy": copy, "gemm": lambda: a @ b}, options.repeats, device)
    moved = 8 * sum(tensor.numel() for tensor in source) / 1e9
    memory = f"{options.elements / 2**20:g} Mi float32, read and written"
    return [
        _limit("scale", "GB/s", moved / seconds["scale"], f"in place, {memory}"),
        _limit("copy", "GB/s", moved / seconds["copy"], memory),
        _limit("gemm", "GFLOP/s", 2 * size**3 / seconds["gemm"] / 1e9, f"float32, {size} x {size} x {size}"),
    ]


def _limit(name: str, unit: str, value: float, conditions: str) -> Row:
    return Row(f"limits.{name}", unit, None, None, value, conditions)
