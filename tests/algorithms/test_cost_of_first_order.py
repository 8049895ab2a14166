"""What first-order steps and the projection of their change cost beside the arithmetic: memory that is asked for, rebuilds."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import profile

from fedtune.algorithms import LocalWork
from fedtune.algorithms.change import Change
from fedtune.algorithms.ferret import chosen_seeds, project
from fedtune.algorithms.first_order import FirstOrder, Optimizer, is_finite
from fedtune.config import RunConfig
from fedtune.directions import Pool
from fedtune.layout import Layout
from fedtune.models import LanguageModel
from fedtune.perturb import LiveWeights, parts
from fedtune.replica import Replica
from fedtune.wire import Instruction
from tests.algorithms.test_first_order import config, work_of

KINDS = [("float32", "nearest"), ("bfloat16", "nearest"), ("bfloat16", "master"), ("bfloat16", "stochastic")]


def largest(run: object) -> int:
    """Bytes of the largest piece of memory that torch asked for while `run` ran, inside its operations too."""
    assert callable(run)
    run()  # state that lasts is made
    with profile(profile_memory=True) as seen:
        run()
    return max((event.cpu_memory_usage for event in seen.events()), default=0)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize(("dtype", "rule"), KINDS[:3])
def test_a_step_asks_for_no_memory_as_large_as_a_tensor(dtype: str, rule: str, optimizer: str) -> None:
    """Neither the check of the gradient nor the step copies it, or the weight, as a whole to float32."""
    weight = Parameter(torch.randn(2048, 256).to(getattr(torch, dtype)))
    gradient = torch.randn_like(weight) * 1e-3
    live = LiveWeights([weight], Layout.from_shapes([("w", (2048, 256))]))
    live.begin(rule)
    chosen = {} if dtype == "float32" else {"dtype": dtype, "update_rounding": rule}
    step = Optimizer(config(optimizer=optimizer, **chosen), live)

    def run() -> None:
        assert is_finite(gradient)
        step.step(0, weight, gradient)

    assert largest(run) <= 4 * parts.CACHED * torch.get_num_threads() < 4 * weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_is_finite_when_all_of_it_is(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        gradient = torch.randn(50, 3).to(dtype)
        gradient[31, 1] = value
        assert not is_finite(gradient)
    assert is_finite(torch.full((64, 64), 6e4, dtype=dtype)), "a norm that does not fit the dtype is no fault"
    assert is_finite(torch.zeros((), dtype=dtype))
    assert is_finite(torch.empty(0, 3, dtype=dtype))


def trained(lm: LanguageModel, dtype: str, rule: str) -> tuple[LocalWork, RunConfig]:
    """A client's work after two steps."""
    model = lm.model.to(getattr(torch, dtype))
    replica = Replica(model, Layout.of(model, "grouped"))
    work = work_of(replica)
    replica.perturbation.live.begin(rule, 3)
    chosen = {} if dtype == "float32" else {"dtype": dtype, "update_rounding": rule}
    asked = config(**chosen)
    with FirstOrder(work, asked) as steps:
        assert None not in (steps.take(), steps.take())
    return work, asked


@pytest.mark.parametrize(("dtype", "rule"), KINDS)
def test_a_walk_gives_the_changes_in_memory_that_is_used_again(
    tiny_lm: LanguageModel, dtype: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "CACHED", 100)
    work, _ = trained(tiny_lm, dtype, rule)
    change = Change.of(work)
    places = set()
    for (index, delta), expected in zip(change.walk(), change, strict=True):
        assert delta.dtype == torch.float32
        assert delta.shape == work.weights[index].shape
        assert torch.equal(delta, expected)
        places.add(delta.data_ptr())
    assert len(places) == 1
    assert any(delta.any() for delta in change)


@pytest.mark.parametrize(("family", "walks"), [("hadamard", 1), ("rademacher", 2), ("lowrank", 2)])
def test_the_start_is_rebuilt_once_where_all_coordinates_cost_what_some_do(
    tiny_lm: LanguageModel, family: str, walks: int
) -> None:
    """And the coordinates are those of the seeds chosen, of the whole change."""
    work, asked = trained(tiny_lm, "float32", "nearest")
    calls: list[int] = []

    def start(index: int, out: Tensor | None = None, /) -> Tensor:
        calls.append(index)
        assert work.start is not None
        return work.start(index, out)

    layout = work.directions.layout
    replica = Replica(tiny_lm.model, layout)
    directions = replica.directions(Pool(family, 5, 64))
    other = replace(work, directions=directions, start=start)
    instruction = Instruction(1, bytes(16), layout.digest, bytes(16), 0, (), np.zeros(0, np.uint16))
    found = project(other, Change.of(other), asked, instruction)
    assert found is not None
    assert len(calls) == walks * len(work.weights)
    counts, coordinates = found
    assert counts.sum() == len(coordinates) == asked.K
    wanted = chosen_seeds(asked, 1, work.client, counts, 64)
    np.testing.assert_allclose(coordinates, directions.project(enumerate(Change.of(work)))[wanted], rtol=1e-4, atol=1e-7)


def test_a_change_that_is_not_finite_ends_the_walk_in_silence(tiny_lm: LanguageModel) -> None:
    work, asked = trained(tiny_lm, "float32", "nearest")
    with torch.no_grad():
        work.weights[1].view(-1)[:2] = torch.tensor([float("inf"), float("nan")])
    layout = work.directions.layout
    instruction = Instruction(1, bytes(16), layout.digest, bytes(16), 0, (), np.zeros(0, np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert project(work, Change.of(work), asked, instruction) is None
