"""Steps that wait give the weights of steps applied at once, to the bit; 16-bit weights by three rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fedtune.directions import Directions, Pool
from fedtune.directions.threads import PIECE
from fedtune.layout import Layout
from fedtune.perturb import LiveWeights, Perturbation, live
from tests.perturb.test_perturb import Nested, build, loss_of

FAMILIES = ("hadamard", "rademacher", "gaussian", "lowrank", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPS = [(3, 0.01), (5, -0.02), (3, 0.004), (0, 0.1)]


def tensors(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    torch.manual_seed(1)
    shapes = ((7, 33), (65,), (), (2, 5, 6))
    return [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def directions_of(parameters: list[Parameter], family: str = "hadamard") -> Directions:
    shapes = [(str(i), tuple(p.shape)) for i, p in enumerate(parameters)]
    return Directions(Layout.from_shapes(shapes), Pool(family, 9, 8))


def at_once(family: str, dtype: torch.dtype) -> list[Tensor]:
    weights = [p.data for p in tensors(dtype)]
    for k, c in STEPS:
        directions_of(tensors(), family).add(weights, k, c)
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_wait_are_the_steps_applied_at_once(family: str, dtype: torch.dtype) -> None:
    parameters = tensors(dtype)
    directions = directions_of(parameters, family)
    weights = LiveWeights(parameters, directions.layout)
    for count, step in enumerate(STEPS):
        weights.move(directions, [step])
        if count == 1:  # only the first tensor is read between steps
            out, expected = torch.empty_like(parameters[0]), torch.empty_like(parameters[0])
            weights.perturb(0, parameters[0].data, directions, 4, 0.5, out)
            directions.perturb(0, parameters[0].data, expected, 4, 0.5)
            assert torch.equal(out, expected)
    weights.settle()
    weights.settle()  # nothing is applied twice
    for parameter, expected in zip(parameters, at_once(family, dtype), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["hadamard", "rademacher", "gaussian", "lowrank"])
def test_one_pass_over_a_large_tensor_is_two(family: str, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    shape = (2 * PIECE // 512 + 77, 512)
    weight = torch.linspace(-1, 1, shape[0] * shape[1]).view(shape).to(dtype)
    directions = Directions(Layout.from_shapes([("w", shape)]), Pool(family, 9, 8))
    moved, out = weight.clone(), torch.empty_like(weight)
    directions.move_and_perturb(0, moved, (2, 0.3), out, (5, -0.7))
    torch.set_num_threads(before)
    expected, perturbed = weight.clone(), torch.empty_like(weight)
    directions.perturb(0, expected, expected, 2, 0.3)
    directions.perturb(0, expected, perturbed, 5, -0.7)
    assert torch.equal(moved, expected)
    assert torch.equal(out, perturbed)


@pytest.mark.parametrize("whole_limit", [0, 1 << 26], ids=["by module", "whole"])
def test_modules_that_a_pass_does_not_reach_get_their_steps_all_the_same(whole_limit: int) -> None:
    model = Nested()
    layout = Layout.of(model)
    directions = Directions(layout, Pool("hadamard", 5, 16))
    perturbation = Perturbation(model, layout, whole_limit)
    expected = [p.detach().clone() for p in model.parameters()]
    for k in (1, 2, 3):
        perturbation.live.move(directions, [(k, 0.1)])
        directions.add(expected, k, 0.1)
        with perturbation.at(directions, 7, 1e-3):
            model(torch.ones(2, 4))
    perturbation.live.settle()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter, value)


def test_begin_forgets_what_waits() -> None:
    parameters = tensors()
    directions = directions_of(parameters)
    weights = LiveWeights(parameters, directions.layout)
    weights.move(directions, STEPS)
    weights.begin()
    weights.settle()
    assert all(torch.equal(p, q) for p, q in zip(parameters, tensors(), strict=True))


# ------------------------------------------------------------------ rules for 16 bits


def walk(rule: str, key: int = 0, steps: int = 400, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """The weights after many steps, each far below half the spacing of most weights."""
    parameters = tensors(dtype)
    directions = directions_of(parameters, "rademacher")
    weights = LiveWeights(parameters, directions.layout)
    weights.begin(rule, key)
    for _ in range(steps):
        weights.move(directions, [(1, 1e-4)])
        weights.perturb(0, parameters[0].data, directions, 2, 1e-3, torch.empty_like(parameters[0]))
    weights.settle()
    return [p.detach().float() for p in parameters]


def exact(steps: int = 400, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    wide = [p.detach().float() for p in tensors(dtype)]
    directions_of(tensors(), "rademacher").add(wide, 1, 1e-4 * steps)
    return wide


def progress(found: list[Tensor]) -> float:
    """1: the weights went as far along the direction as the steps; 0: they did not move."""
    start, goal = [p.detach().float() for p in tensors(torch.bfloat16)], exact()
    along = sum(float(((f - s) * (g - s)).sum()) for f, s, g in zip(found, start, goal, strict=True))
    return along / sum(float((g - s).square().sum()) for s, g in zip(start, goal, strict=True))


def test_rules_for_16_bit_weights_keep_small_steps_or_lose_them() -> None:
    assert progress(walk("nearest")) < 0.2
    assert progress(walk("stochastic")) == pytest.approx(1.0, abs=0.05)
    assert progress(walk("master")) == pytest.approx(1.0, abs=0.05)
    for weight, goal in zip(walk("master"), exact(), strict=True):
        assert torch.allclose(weight, goal, rtol=2**-8, atol=1e-4)  # one rounding


def test_stochastic_rounding_depends_on_its_stream_and_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    one = walk("stochastic", key=5)
    monkeypatch.setattr(live, "PART", 64)  # other cuts
    assert all(torch.equal(a, b) for a, b in zip(one, walk("stochastic", key=5), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, walk("stochastic", key=6), strict=True))


@pytest.mark.parametrize("rule", ["stochastic", "master"])
def test_float32_weights_need_no_rule(rule: str) -> None:
    assert all(
        torch.equal(a, b) for a, b in zip(walk(rule, dtype=torch.float32), walk("nearest", dtype=torch.float32), strict=True)
    )


def test_a_perturbation_starts_from_the_master_copy() -> None:
    parameters = tensors(torch.bfloat16)
    directions = directions_of(parameters)
    weights = LiveWeights(parameters, directions.layout)
    weights.begin("master")
    weights.move(directions, [(1, 1e-4)])
    out = torch.empty_like(parameters[0])
    weights.perturb(0, parameters[0].data, directions, 2, 1e-2, out)
    wide = tensors(torch.bfloat16)[0].detach().float()
    directions.perturb(0, wide, wide, 1, 1e-4)
    assert torch.equal(weights.value(0), wide)
    directions.perturb(0, wide, wide, 2, 1e-2)
    assert torch.equal(out, wide.to(torch.bfloat16))


@pytest.mark.parametrize("rule", ["nearest", "stochastic", "master"])
def test_written_values_are_rounded_by_the_rule(rule: str) -> None:
    parameters = tensors(torch.float16)
    weights = LiveWeights(parameters, directions_of(parameters).layout)
    weights.begin(rule, 3)
    goal = parameters[0].detach().float() + 1e-5
    for _ in range(3):
        weights.change(0, lambda part, wide: wide.add_(1e-5))
    if rule == "master":
        assert torch.allclose(weights.value(0), goal + 2e-5, atol=1e-6)
    near = (goal + 2e-5).to(torch.float16)
    if rule != "stochastic":
        assert (parameters[0] == (near if rule == "master" else parameters[0])).all()
    assert (parameters[0].float() - goal).abs().max() < 2**-9


def test_the_model_runs_on_the_moved_weights() -> None:
    model = build("llama")
    layout = Layout.of(model)
    directions, perturbation = Directions(layout, Pool("hadamard", 5, 16)), Perturbation(model, layout, 0)
    perturbation.live.move(directions, [(3, 0.01)])
    with perturbation.at(directions, 3, -0.01):
        back = loss_of(model)
    twin: Callable[[], nn.Module] = lambda: build("llama")  # noqa: E731 - a model as it was
    assert torch.allclose(back, loss_of(twin()), atol=1e-6)
    assert not torch.allclose(loss_of(model), loss_of(twin()), atol=1e-3)
