"""bfloat16 numbers as bits: to float32 and back as torch does it, and kernels that take either kind of run."""

from __future__ import annotations

import numpy as np
import torch

from fedtune.directions import Directions, Pool
from fedtune.directions.cpu.bfloat16 import narrow, widen
from fedtune.layout import Layout

ALL = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy()


def test_every_bfloat16_becomes_its_float32_and_comes_back() -> None:
    wide = np.empty(1 << 16, np.float32)
    widen(wide, bits(ALL))
    assert np.array_equal(wide.view(np.uint32), ALL.float().numpy().view(np.uint32))
    back = torch.empty_like(ALL)
    narrow(bits(back), wide)
    assert torch.equal(back[~ALL.isnan()], ALL[~ALL.isnan()])
    assert torch.equal(back.isnan(), ALL.isnan())


def test_float32_is_rounded_to_the_nearest_as_torch_does() -> None:
    every = np.random.default_rng(0).integers(0, 1 << 32, 300_000, dtype=np.uint32)
    ties = (every[:1000] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = torch.from_numpy(np.concatenate([every, ties, ties - np.uint32(1), ties + np.uint32(1)]).view(np.float32))
    found = torch.empty(values.shape, dtype=torch.bfloat16)
    narrow(bits(found), values.numpy())
    known = ~values.isnan()
    assert torch.equal(found[known], values[known].to(torch.bfloat16))
    assert torch.equal(found.isnan(), values.isnan())


def test_bits_in_place_are_the_copy_in_float32_rounded_once() -> None:
    """A base mapped from a file is bfloat16, the target may be float32 or the same tensor."""
    size = 3 * 4096 + 77
    directions = Directions(Layout.from_shapes([("a", (size,))]), Pool("hadamard", 3, 50))
    coefficients = np.random.default_rng(1).integers(-9, 10, (1, 50)).astype(np.float32) / 64
    base = torch.randn(size).to(torch.bfloat16)
    wide, mixed, in_place = torch.empty(size), torch.empty(size), base.clone()
    directions.combine([base.float()], [wide], coefficients)
    directions.combine([base], [mixed], coefficients)
    directions.combine([in_place], [in_place], coefficients)
    assert torch.equal(mixed, wide)
    assert torch.equal(in_place, wide.to(torch.bfloat16))
