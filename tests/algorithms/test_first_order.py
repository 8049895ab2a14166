"""First-order local steps: the optimisers against torch's, and what is in memory when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune.algorithms import LocalWork, first_order
from fedtune.algorithms.ferret import local_update
from fedtune.algorithms.first_order import FirstOrder
from fedtune.config import RunConfig
from fedtune.data.batches import Batch, collate
from fedtune.data.encode import Encoded
from fedtune.directions import Pool
from fedtune.evaluation import response_loss
from fedtune.layout import Layout
from fedtune.models import LanguageModel
from fedtune.replica import Replica
from fedtune.wire import Instruction, Status, Update

POOL = Pool("hadamard", 5, 64)


@pytest.fixture(autouse=True)
def _each_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a large model: gradients of a tiny one would be gathered."""
    monkeypatch.setattr(first_order, "GATHERED", 0)


@pytest.fixture
def replica(tiny_lm: LanguageModel) -> Replica:
    return Replica(tiny_lm.model, Layout.of(tiny_lm.model, "grouped"), tiny_lm.folder)


def batches() -> Iterator[Batch]:
    step = 0
    while True:
        step += 1
        yield collate([Encoded((1, *(3 + (7 * step + i) % 200 for i in range(12)), 2), 5, step)], 0)


def work_of(replica: Replica) -> LocalWork:
    return LocalWork(
        replica.model, replica.weights, response_loss, batches(), replica.directions(POOL), replica.perturbation,
        "0", 8, replica.start,
    )  # fmt: skip


def config(**changes: object) -> RunConfig:
    return RunConfig.from_mapping({"algorithm": "ferret", "K": 64, "local_steps": 5, "lr": 0.01, **changes})


def update(work: LocalWork, asked: RunConfig) -> Update:
    layout = work.directions.layout
    return local_update(work, asked, Instruction(1, bytes(16), layout.digest, bytes(16), 0, (), np.zeros(0, np.uint16)))


def take(replica: Replica, asked: RunConfig, count: int = 5) -> list[Tensor]:
    """The weights after `count` steps from the base."""
    with FirstOrder(work_of(replica), asked) as steps:
        for _ in range(count):
            assert steps.take() is not None
    return [weight.detach().clone() for weight in replica.weights]


def with_torch(replica: Replica, make: Callable[[list[Tensor]], torch.optim.Optimizer], count: int = 5) -> list[Tensor]:
    optimizer = make(list(replica.weights))
    source = batches()
    for _ in range(count):
        optimizer.zero_grad()
        response_loss(replica.model, next(source)).backward()
        optimizer.step()
    return [weight.detach().clone() for weight in replica.weights]


def reset(replica: Replica, start: list[Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(replica.weights, start, strict=True):
            weight.copy_(value)


@pytest.mark.parametrize(
    ("changes", "make", "apart"),
    [
        ({}, lambda weights: torch.optim.SGD(weights, lr=0.01), 1e-8),
        (
            {"optimizer": "momentum", "local_momentum": 0.8},
            lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.8),
            1e-8,
        ),
        ({"optimizer": "adamw"}, lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.0, fused=True), 1e-8),
        ({"optimizer": "adamw"}, lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.0, foreach=False), 1e-6),
    ],
    ids=["sgd", "momentum", "adamw", "adamw, rounded elsewhere"],
)
@pytest.mark.parametrize("clip", [0.0, 1e9], ids=["at once", "all gradients"])
def test_the_optimisers_are_torchs(
    replica: Replica,
    changes: dict[str, object],
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    apart: float,
    clip: float,
) -> None:
    """Tied embeddings included: their gradient is complete only when both uses have been walked back."""
    start = [weight.detach().clone() for weight in replica.weights]
    expected = with_torch(replica, make)
    reset(replica, start)
    got = take(replica, config(clip_norm=clip, **changes))
    for one, other, before in zip(got, expected, start, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=apart)
        assert not torch.equal(one, before)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_working_inside_the_backward_pass_changes_no_bit(replica: Replica, optimizer: str) -> None:
    start = [weight.detach().clone() for weight in replica.weights]
    at_once = take(replica, config(optimizer=optimizer))
    reset(replica, start)
    together = take(replica, config(optimizer=optimizer, clip_norm=1e9))
    assert all(torch.equal(one, other) for one, other in zip(at_once, together, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_gradients_that_are_small_are_gathered_and_change_no_bit(
    replica: Replica, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = [weight.detach().clone() for weight in replica.weights]
    asked = config(optimizer=optimizer)
    at_once = take(replica, asked)
    reset(replica, start)
    size = sum(weight.numel() * weight.element_size() for weight in replica.weights)
    monkeypatch.setattr(first_order, "GATHERED", size)
    hooked: list[object] = []
    monkeypatch.setattr(FirstOrder, "_arrived", lambda *arguments: hooked.append(arguments))
    gathered = take(replica, asked)
    assert not hooked
    assert all(torch.equal(one, other) for one, other in zip(at_once, gathered, strict=True))
    assert not first_order.gathers(asked, size + 1)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_sixteen_bit_weights_move_and_keep_their_dtype(replica: Replica, tiny_lm: LanguageModel, optimizer: str) -> None:
    model = tiny_lm.model.to(torch.bfloat16)
    half = Replica(model, Layout.of(model, "grouped"))
    before = [weight.detach().clone() for weight in half.weights]
    after = take(half, config(optimizer=optimizer))
    assert {weight.dtype for weight in half.weights} == {torch.bfloat16}
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_gradients_do_not_pile_up(replica: Replica) -> None:
    """When the gradient of the first tensor arrives, the last in the backward pass, no other is there any more."""
    alive: list[int] = []
    seen = replica.weights[0].register_post_accumulate_grad_hook(
        lambda _: alive.append(sum(weight.grad is not None for weight in replica.weights))
    )
    for clip in (0.0, 1.0):
        with FirstOrder(work_of(replica), config(clip_norm=clip)) as steps:
            steps.take()
    seen.remove()
    assert alive == [1, len(replica.weights)]
    assert all(weight.grad is None for weight in replica.weights)


def test_no_hook_is_left_behind(replica: Replica) -> None:
    take(replica, config())
    before = [weight.detach().clone() for weight in replica.weights]
    response_loss(replica.model, next(batches())).backward()
    assert all(weight.grad is not None for weight in replica.weights)
    assert all(torch.equal(weight, other) for weight, other in zip(replica.weights, before, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_leaves_the_weights(replica: Replica, accumulate: int) -> None:
    before = [weight.detach().clone() for weight in replica.weights]
    broken = replace(work_of(replica), loss=lambda model, batch: response_loss(model, batch) * float("inf"))
    with FirstOrder(broken, config(accumulate=accumulate)) as steps:
        assert steps.take() is None
    assert all(torch.equal(weight, other) for weight, other in zip(replica.weights, before, strict=True))


class _Poisoned(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["at once", "all gradients"])
def test_a_gradient_that_is_not_finite_makes_an_empty_update(replica: Replica, clip: float) -> None:
    """Nothing that is not finite is written, and nothing is sent."""

    def poisoned(model: torch.nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = _Poisoned.apply(response_loss(model, batch))
        return loss

    found = update(replace(work_of(replica), loss=poisoned), config(clip_norm=clip))
    assert (found.status, found.steps, found.train_loss) == (Status.NOT_FINITE, 0, 0.0)
    assert not found.scalars.any()
    assert all(bool(weight.isfinite().all()) for weight in replica.weights)


def test_weights_that_blow_up_make_an_empty_update(replica: Replica) -> None:
    """All losses are finite, but the last step writes weights that are not."""
    steep = replace(work_of(replica), loss=lambda model, batch: response_loss(model, batch) * 1e6)
    found = update(steep, config(lr=1e38, local_steps=1))
    assert not all(bool(weight.isfinite().all()) for weight in replica.weights)
    assert (found.status, found.steps) == (Status.NOT_FINITE, 1)
    assert not found.scalars.any()


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"clip_norm": 0.1}, {"optimizer": "adamw"}])
def test_a_rebuilt_start_and_a_copied_one_give_the_same_update(replica: Replica, changes: dict[str, object]) -> None:
    before = [weight.detach().clone() for weight in replica.weights]
    rebuilt = update(work_of(replica), config(**changes))
    reset(replica, before)
    copied = update(replace(work_of(replica), start=None), config(**changes))
    assert rebuilt.scalars.any()
    assert rebuilt.scalars.tobytes() == copied.scalars.tobytes()
    assert rebuilt.counts.tolist() == copied.counts.tolist()
