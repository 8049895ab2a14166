"""Training inside the shared subspace: its gradient, its steps and its model against slow oracles."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtune.algorithms import LocalWork
from fedtune.algorithms.coordinates import allocate
from fedtune.algorithms.subspace import BETAS, SUBSPACE, Gradients, Optimizer, aggregate, local_update
from fedtune.coefficients import Coefficients, PoolCoefficients, leading, quantise
from fedtune.config import RunConfig
from fedtune.data.batches import Batch, collate
from fedtune.data.encode import Encoded
from fedtune.directions import Pool
from fedtune.directions.base import F64
from fedtune.directions.oracle import dense
from fedtune.errors import ContradictionError
from fedtune.evaluation import response_loss
from fedtune.layout import Layout
from fedtune.models import LanguageModel
from fedtune.replica import Replica
from fedtune.wire import Instruction, Status, Update

SHARED = ("hadamard", "rademacher", "gaussian", "lowrank", "torch")
SIZE = 32


def sample(step: int) -> Encoded:
    return Encoded((1, *(3 + (7 * step + i) % 200 for i in range(12)), 2), 5, step)


def batches() -> Iterator[Batch]:
    step = 0
    while True:
        step += 1
        yield collate([sample(step)], 0)


@pytest.fixture
def replica(tiny_lm: LanguageModel) -> Replica:
    return Replica(tiny_lm.model, Layout.of(tiny_lm.model, "grouped"), tiny_lm.folder)


def sixteen(lm: LanguageModel, dtype: torch.dtype) -> Replica:
    return Replica(lm.model.to(dtype), Layout.of(lm.model, "grouped"))


def pool(family: str = "hadamard", seed: int = 5) -> Pool:
    return Pool(family, seed, SIZE)


def begin(replica: Replica, opened: Pool, closed: tuple[PoolCoefficients, ...] = (), rule: str = "nearest") -> LocalWork:
    """What a client works on, from a model with an open pool that is zero."""
    replica.become(Coefficients((*closed, PoolCoefficients.zero(opened, replica.layout.blocks))))
    replica.touch()
    replica.perturbation.live.begin(rule, 3)
    return LocalWork(
        replica.model, replica.weights, response_loss, batches(), replica.directions(opened), replica.perturbation,
        "0", 8, moves=replica,
    )  # fmt: skip


def config(**changes: object) -> RunConfig:
    return RunConfig.from_mapping({"algorithm": "subspace", "K": 64, "local_steps": 4, "lr": 0.01, **changes})


def counts(replica: Replica, total: int = 64) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    sizes = np.array(replica.layout.block_sizes)
    return allocate(np.sqrt(sizes), sizes, total, SIZE, "norm-sqrt-size")


def update(work: LocalWork, asked: RunConfig, total: int = 64) -> Update:
    asked_for = allocate(np.sqrt(sizes := np.array(work.directions.layout.block_sizes)), sizes, total, SIZE, "norm-sqrt-size")
    instruction = Instruction(
        1, bytes(16), work.directions.layout.digest, bytes(16), 0, (), np.zeros(0, np.uint16), asked_for.astype(np.uint16)
    )
    return local_update(work, asked, instruction)


def table(found: Update, size: int = SIZE) -> F64:
    """float64 [L, K]: the coordinates of an update in their places."""
    result = np.zeros((len(found.counts), size))
    result[leading(found.counts, size)] = found.scalars
    return result


def snapshot(replica: Replica) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in replica.weights]


# ---------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("family", SHARED)
def test_the_gradient_is_that_of_the_weights_on_each_direction(replica: Replica, family: str) -> None:
    work = begin(replica, pool(family))
    wanted = leading(counts(replica), SIZE)
    with Gradients(work, wanted) as gradients:
        found = gradients.take(1)
    assert found is not None
    assert all(weight.grad is None for weight in replica.weights)
    loss = response_loss(replica.model, next(batches()))
    loss.backward()  # type: ignore[no-untyped-call]
    expected, done = np.zeros(wanted.shape), 0
    rows = dense(work.directions.pool, replica.layout)
    for entry, weight in zip(replica.layout.entries, replica.weights, strict=True):
        assert weight.grad is not None
        expected[entry.block] += rows[:, done : done + entry.numel] @ weight.grad.double().reshape(-1).numpy()
        weight.grad, done = None, done + entry.numel
    assert found[0] == pytest.approx(loss.item())
    np.testing.assert_allclose(found[1], np.where(wanted, expected, 0.0), atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("threads", [1, 2])  # with two, gradients of a batch are held until the next brings the same tensor
def test_micro_batches_are_averaged(replica: Replica, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def take(work: LocalWork, number: int) -> tuple[float, F64]:
        with Gradients(work, np.ones((replica.layout.blocks, SIZE), dtype=np.bool_)) as gradients:
            found = gradients.take(number)
        assert found is not None
        return found

    together = replace(begin(replica, pool()), batches=iter([collate([sample(1), sample(2)], 0)]))
    one, other = take(begin(replica, pool()), 2), take(together, 1)
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    np.testing.assert_allclose(one[1], other[1], atol=1e-4 * np.abs(other[1]).max())


# ---------------------------------------------------------------------------------------------------- the steps


def test_adamw_is_that_of_torch_with_a_rate_for_each_block() -> None:
    number = np.array([3, 2])
    wanted, scales = leading(number, 3), np.array([0.5, 2.0])
    own = Optimizer(config(optimizer="adamw"), scales, number)
    theirs = [torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in number]
    rates = 0.01 * scales / np.sqrt(number)
    optimizers = [
        torch.optim.AdamW([c], lr=r, betas=BETAS, eps=0.0, weight_decay=0) for c, r in zip(theirs, rates, strict=True)
    ]
    for step in range(6):
        gradient = np.where(wanted, np.cos(np.arange(6).reshape(2, 3) + step), 0.0)
        found = own.step(gradient, 2.0)
        for row, c, optimizer, n in zip(gradient, theirs, optimizers, number, strict=True):
            c.grad = torch.from_numpy(row[:n].copy())
            optimizer.step()
    np.testing.assert_allclose(found[0], theirs[0].detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(found[1, :2], theirs[1].detach().numpy(), rtol=1e-12)
    assert found[1, 2] == 0.0


def test_sgd_and_momentum_take_the_direction_of_each_gradient_and_not_its_length() -> None:
    number, scales, rate = np.array([2]), np.array([1.0]), 0.01 / math.sqrt(2)
    first, second = np.array([[3.0, 4.0]]), np.array([[-1.0, 1.0]])
    one, other = first / math.sqrt(12.5), second
    plain = Optimizer(config(optimizer="sgd"), scales, number)
    np.testing.assert_allclose(plain.step(first, 2.0), -rate * one)
    np.testing.assert_allclose(plain.step(1e6 * second, 1.0), -rate * (one + other))
    slow = Optimizer(config(optimizer="momentum", local_momentum=0.5), scales, number)
    np.testing.assert_allclose(slow.step(first, 2.0), -rate * one)
    np.testing.assert_allclose(slow.step(second, 2.0), -rate * (one + (0.25 * one + 0.5 * other) / 0.75))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize(("loss", "part"), [(9.0, 1.0), (1.0, 1.0), (0.25, 0.25), (0.01, 0.01), (0.0, 0.0), (-1e-9, 0.0)])
def test_steps_are_shorter_where_little_loss_is_left(optimizer: str, loss: float, part: float) -> None:
    number, gradient = np.array([2]), np.array([[3.0, 4.0]])
    near, far = (Optimizer(config(optimizer=optimizer), np.array([1.0]), number).step(gradient, given) for given in (loss, 2.0))
    np.testing.assert_allclose(near, part * far)


def test_a_block_without_a_gradient_stays() -> None:
    number = np.array([2, 0])
    own = Optimizer(config(), np.array([1.0, 1.0]), number)
    assert not own.step(np.zeros((2, 2)), 2.0).any()


@pytest.mark.parametrize("total", [24, 300])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_the_rate_is_a_steps_norm_relative_to_a_blocks_weights(replica: Replica, total: int, optimizer: str) -> None:
    before = snapshot(replica)
    update(begin(replica, pool()), config(local_steps=1, lr=0.02, optimizer=optimizer), total)
    moved, size = np.zeros(replica.layout.blocks), np.zeros(replica.layout.blocks)
    for entry, weight, start in zip(replica.layout.entries, replica.weights, before, strict=True):
        moved[entry.block] += float((weight.detach() - start).double().square().sum())
        size[entry.block] += float(start.double().square().sum())
    used = counts(replica, total) > 0
    assert used.sum() > 2
    np.testing.assert_allclose(np.sqrt(moved / size)[used], 0.02, rtol=0.2)  # directions overlap a little in small blocks


# ---------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("family", SHARED)
def test_what_was_trained_is_what_is_rebuilt(replica: Replica, family: str) -> None:
    """At 24 bits; float32 sums of two orders apart."""
    work = begin(replica, pool(family))
    before = snapshot(replica)
    found = update(work, config())
    live = snapshot(replica)
    assert found.status == Status.FINISHED
    replica.become(Coefficients((quantise(work.directions.pool, table(found), 24),)))
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(live, before, strict=True)))
    off = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(live, snapshot(replica), strict=True)))
    assert off < 1e-4 * moved


def test_moves_do_not_add_up(replica: Replica) -> None:
    """After any number of moves the weights are those of one move, to the bit; and back at the start with zeros."""
    begin(replica, pool())
    start = snapshot(replica)
    last = np.random.default_rng(1).normal(size=(replica.layout.blocks, SIZE)) * 1e-3
    replica.move(last)
    once = snapshot(replica)
    for number in range(5):
        replica.move(last * number)
    replica.move(last)
    assert all(map(torch.equal, snapshot(replica), once))
    replica.move(np.zeros_like(last))
    assert all(map(torch.equal, snapshot(replica), start))


@pytest.mark.parametrize("finished", [1, 12])
def test_moves_begin_at_the_model_with_all_its_pools(replica: Replica, finished: int) -> None:
    random, blocks = np.random.default_rng(2), replica.layout.blocks
    closed = tuple(quantise(pool(seed=10 + number), random.normal(size=(blocks, SIZE)) * 1e-3, 8) for number in range(finished))
    begin(replica, pool(), closed)
    moved = random.normal(size=(blocks, SIZE)) * 1e-3
    replica.move(moved)
    live = snapshot(replica)
    opened = quantise(pool(), moved, 24)
    replica.become(Coefficients((*closed, opened)))
    for one, other in zip(live, snapshot(replica), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_fresh_pool_is_moved_along_although_the_model_is_the_same(replica: Replica) -> None:
    """Two open pools that are zero have the same digest, so nothing is rebuilt between them."""
    moved = np.full((replica.layout.blocks, SIZE), 1e-3)
    begin(replica, pool(seed=1))
    replica.become(Coefficients(()))
    replica.become(Coefficients((PoolCoefficients.zero(pool(seed=2), replica.layout.blocks),)))
    replica.move(moved)
    after = snapshot(replica)
    replica.touch()
    begin(replica, pool(seed=2))
    replica.move(moved)
    assert all(map(torch.equal, after, snapshot(replica)))
    begin(replica, pool(seed=1))
    replica.move(moved)
    assert not all(map(torch.equal, after, snapshot(replica)))


@pytest.mark.parametrize("rule", ["nearest", "stochastic"])
def test_small_steps_reach_16_bit_weights_together(tiny_lm: LanguageModel, rule: str) -> None:
    """Each of 100 steps is far below the spacing of the weights; rounded from the sum, they move as their sum does."""
    replica = sixteen(tiny_lm, torch.bfloat16)
    begin(replica, pool(), rule=rule)
    before = [weight.double() for weight in snapshot(replica)]
    each = np.random.default_rng(3).normal(size=(replica.layout.blocks, SIZE)) * 4e-6
    for number in range(1, 101):
        replica.move(number * each)
    directions = replica.directions(pool())
    wide = [torch.zeros_like(weight, dtype=torch.float32) for weight in replica.weights]
    directions.combine(wide, wide, (100 * each).astype(np.float32))
    moved = torch.cat([(a.double() - b).reshape(-1) for a, b in zip(snapshot(replica), before, strict=True)])
    asked = torch.cat([delta.double().reshape(-1) for delta in wide])
    along = float(moved @ asked) / float(asked @ asked)
    assert 0.8 < along < 1.2
    replica.move(each)
    alone = torch.cat([(a.double() - b).reshape(-1) for a, b in zip(snapshot(replica), before, strict=True)])
    lost = 1 - float(alone @ asked) / float(asked @ asked) * 100
    assert (lost > 0.2) if rule == "nearest" else (abs(lost) < 0.5)  # one alone is lost, unless by chance


def test_scales_are_root_mean_squares_of_the_base(replica: Replica) -> None:
    begin(replica, pool())
    expected = np.zeros(replica.layout.blocks)
    for entry, weight in zip(replica.layout.entries, replica.weights, strict=True):
        expected[entry.block] += float(weight.detach().double().square().sum())
    replica.move(np.full((replica.layout.blocks, SIZE), 0.1))
    np.testing.assert_allclose(replica.scales, np.sqrt(expected / np.array(replica.layout.block_sizes)))


# ---------------------------------------------------------------------------------------------------- a round


def test_a_loss_that_is_not_finite_ends_the_work_with_an_empty_update(replica: Replica) -> None:
    losses = iter([1.0, 1.0, math.nan])
    work = begin(replica, pool())
    broken = replace(work, loss=lambda model, batch: response_loss(model, batch) * next(losses))
    found = update(broken, config())
    assert (found.status, found.steps) == (Status.NOT_FINITE, 2)
    assert not found.scalars.any()
    assert len(found.scalars) == 64


def test_after_the_deadline_the_steps_done_are_the_update(replica: Replica) -> None:
    late = update(replace(begin(replica, pool()), deadline=time.monotonic() - 1), config())
    one = update(begin(replica, pool()), config(local_steps=1))
    assert (late.status, late.steps) == (Status.FINISHED, 1)
    np.testing.assert_array_equal(late.scalars, one.scalars)


def test_the_servers_step_is_the_weighted_mean_and_its_norms_are_those_of_the_weights(replica: Replica) -> None:
    asked, layout = config(clients=2, K=64, server_lr=0.5), replica.layout
    state = SUBSPACE.start(asked, layout)
    number = SUBSPACE.counts(state, asked, layout)
    random = np.random.default_rng(4)
    updates = {
        client: Update(
            1, bytes(16), Status.FINISHED, 4, examples, 1.0, random.normal(size=int(number.sum())).astype(np.float32), number
        )
        for client, examples in (("a", 1), ("b", 3))
    }
    after = aggregate(state, updates, asked, layout)
    mean = 0.25 * updates["a"].scalars.astype(np.float64) + 0.75 * updates["b"].scalars.astype(np.float64)
    np.testing.assert_allclose(after.values[leading(number, state.pool.size)], 0.5 * mean, rtol=1e-12)
    assert not after.values[~leading(number, state.pool.size)].any()
    step = np.zeros(after.values.shape, dtype=np.float32)
    step[leading(number, state.pool.size)] = mean
    moved = [torch.zeros(entry.shape) for entry in layout.entries]
    replica.directions(state.pool).combine(moved, moved, step)
    squares = np.zeros(layout.blocks)
    for entry, tensor in zip(layout.entries, moved, strict=True):
        squares[entry.block] += float(tensor.double().square().sum())
    np.testing.assert_allclose(after.statistics["norms"][:, 0], np.sqrt(squares), rtol=0.5)


def test_the_next_round_has_a_fresh_pool_and_the_norms_of_the_last(replica: Replica) -> None:
    asked, layout = config(rounds=3), replica.layout
    state = SUBSPACE.start(asked, layout)
    moved = replace(state, round=1, statistics={"norms": np.arange(1.0, layout.blocks + 1)[:, None]})
    fresh = SUBSPACE.begin_round(moved, asked, layout)
    assert fresh.pool.seed != state.pool.seed
    np.testing.assert_array_equal(fresh.statistics["norms"], moved.statistics["norms"])
    assert (SUBSPACE.counts(fresh, asked, layout) != SUBSPACE.counts(state, asked, layout)).any()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dtype": "bfloat16", "update_rounding": "master"}, "update_rounding"),
        ({"clip_norm": 1.0}, "clip_norm"),
        ({"reconstruction": "shrunken"}, "reconstruction"),
        ({"momentum": 0.5}, "momentum"),
        ({"allocation": "official"}, "coordinates"),
        ({"coordinates": "own"}, "coordinates = own"),
        ({"offload": True}, "offload"),
    ],
)
def test_what_means_nothing_is_refused(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ContradictionError, match=key):
        config(**changes)
