"""Stochastic rounding: one of the two neighbours, right in the mean, the same for the same stream."""

from __future__ import annotations

import math

import pytest
import torch

from fedtune.perturb import rounding
from fedtune.perturb.rounding import round_stochastically

DTYPES = (torch.bfloat16, torch.float16)


def rounded(wide: torch.Tensor, dtype: torch.dtype, draw: int = 0, p0: int = 0, key: int = 11) -> torch.Tensor:
    out = torch.empty(wide.shape, dtype=dtype)
    round_stochastically(out, wide, p0, draw, key)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_goes_to_one_of_its_neighbours_and_to_itself_if_it_has_a_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.cat([torch.randn(9000), torch.randn(500) * 1e-7, torch.randn(500) * 1e3, torch.zeros(3)])
    found = rounded(wide, dtype).float()
    step = torch.where(wide == 0, 0.0, 2.0 ** (wide.abs().log2().floor() - (7 if dtype == torch.bfloat16 else 10)))
    least = 2.0**-24 if dtype == torch.float16 else 0.0  # the spacing of subnormal numbers
    assert ((found - wide).abs() < step.clamp(min=least) + (wide == 0)).all()
    assert (found != wide.to(dtype).float()).any()
    exact = wide.to(dtype).float()
    assert torch.equal(rounded(exact, dtype).float(), exact)


@pytest.mark.parametrize("value", [1.0 + 2**-10, -3.0 - 2**-9, 1e-3 + 1e-7, 2.0**-25, -(2.0**-26)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_the_value(dtype: torch.dtype, value: float) -> None:
    count = 200_000
    found = rounded(torch.full((count,), value), dtype).double()
    spread = float(found.std())
    assert abs(float(found.mean()) - value) <= 5 * spread / math.sqrt(count) + 1e-12 * abs(value)
    if torch.tensor(value).to(dtype).double() != torch.tensor(value).double():
        assert len(found.unique()) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_at_the_end_of_the_range_stay(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    wide = torch.tensor([math.inf, -math.inf, math.nan, largest, -largest])
    found = rounded(wide, dtype).float()
    assert torch.equal(found[[0, 1, 3, 4]], wide[[0, 1, 3, 4]])
    assert found[2].isnan()


@pytest.mark.parametrize("p0", [0, 3, 8, 4093])
def test_compiled_and_by_torch_operations_it_is_the_same(monkeypatch: pytest.MonkeyPatch, p0: int) -> None:
    largest = torch.finfo(torch.bfloat16).max
    ends = torch.tensor([math.inf, -math.inf, largest, largest * 1.003, -largest * 1.001, 0.0, -0.0, 1e-41, -3e-39])
    wide = torch.cat([torch.randn(10_000), torch.randn(3000) * 1e-38, ends])
    compiled = rounded(wide, torch.bfloat16, draw=2, p0=p0)
    monkeypatch.setattr(rounding, "is_bfloat16", lambda tensor: False)
    assert torch.equal(compiled, rounded(wide, torch.bfloat16, draw=2, p0=p0))


def test_the_cut_and_the_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.randn(37, 41)
    whole = rounded(wide, torch.bfloat16, draw=3, p0=6)
    monkeypatch.setattr(rounding, "CHUNK", 10)
    monkeypatch.setattr(rounding, "is_bfloat16", lambda tensor: False)
    assert torch.equal(rounded(wide, torch.bfloat16, draw=3, p0=6), whole)  # by torch operations, as on other devices
    strided = torch.empty(41, 37, dtype=torch.bfloat16).T
    round_stochastically(strided, wide, 6, 3, 11)
    assert torch.equal(strided, whole)
    rest = torch.empty(1517 - 100, dtype=torch.bfloat16)
    round_stochastically(rest, wide.view(-1)[100:], 106, 3, 11)
    assert torch.equal(rest, whole.view(-1)[100:])
    for other in (rounded(wide, torch.bfloat16, draw=4, p0=6), rounded(wide, torch.bfloat16, draw=3, p0=6, key=12)):
        assert not torch.equal(other, whole)
