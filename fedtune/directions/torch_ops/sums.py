"""Sums whose order is fixed by the number of terms: halves are added to halves, elementwise, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def ordered_sum(x: Tensor) -> Tensor:
    """The sum over the last dimension (not empty), in the dtype of x."""
    while (count := x.shape[-1]) > 1:
        half = count // 2
        added = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat([added, x[..., 2 * half :]], dim=-1) if count % 2 else added
    return x[..., 0]


def wide(x: Tensor) -> Tensor:
    """x in float64, on its device or, where that has no float64, on the CPU."""
    return (x if _has_float64(x.device) else x.cpu()).to(torch.float64)


def _has_float64(device: torch.device) -> bool:
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"
