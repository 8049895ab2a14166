"""Parts cover a tensor in order, and a weight that is changed by parts is one that was changed as a whole, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fedtune.layout import Layout
from fedtune.perturb import RULES, LiveWeights, Where, cuts, parts

SHAPES = ((70, 33), (65,), (), (2, 5, 6), (0, 4), (1, 900))


@pytest.mark.parametrize("size", [0, 1, 64, 10_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_cover_a_tensor_in_order(shape: tuple[int, ...], size: int) -> None:
    tensor = torch.randn(shape)
    found = list(cuts(tensor, size))
    joined = torch.cat([tensor[part].reshape(-1) for _, part in found] or [torch.empty(0)])
    assert torch.equal(joined, tensor.reshape(-1))
    sizes = [tensor[part].numel() for _, part in found]
    assert [offset for offset, _ in found] == [sum(sizes[:number]) for number in range(len(sizes))]
    row = max(1, tensor.numel() // max(1, len(tensor) if tensor.dim() else 1))
    assert all(count <= max(size or parts.CACHED * torch.get_num_threads(), row) for count in sizes)


def changed(cached: int, rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights, and the values behind them, after two changes of every tensor."""
    monkeypatch.setattr(parts, "CACHED", cached)
    torch.manual_seed(3)
    transposed = torch.randn(40, 30).to(dtype).T
    weights = [Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES] + [Parameter(transposed)]
    gradients = [torch.randn_like(weight) * 1e-3 for weight in weights]
    live = LiveWeights(weights, Layout.from_shapes([(str(i), tuple(w.shape)) for i, w in enumerate(weights)]))
    live.begin(rule, 11)
    for _ in range(2):
        for index, gradient in enumerate(gradients):

            def move(part: Where, wide: Tensor, gradient: Tensor = gradient) -> None:
                assert wide.dtype == torch.float32
                wide.add_(gradient[part], alpha=-0.7)

            live.change(index, move)
    return [weight.detach() for weight in weights] + [live.value(index) for index in range(len(weights))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_parts_change_no_bit(rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = changed(1 << 20, rule, dtype, monkeypatch)
    by_parts = changed(64, rule, dtype, monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(whole, by_parts, strict=True))
