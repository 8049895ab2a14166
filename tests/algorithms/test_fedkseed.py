"""FedKSeed and FedKSeed-Pro: the statements of the paper, one test each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtune.algorithms import ALGORITHMS, LocalWork
from fedtune.algorithms.base import shares
from fedtune.algorithms.fedkseed import DRAW_SCALE, drawn_seeds, probabilities
from fedtune.config import RunConfig
from fedtune.directions import Directions
from fedtune.layout import Layout
from fedtune.perturb import Perturbation
from fedtune.wire import Instruction, Status, Update

LAYOUT = Layout.from_shapes([("a", (4,)), ("b", (3, 2))])
NONE = np.zeros(0, dtype=np.uint16)


def config(**changes: object) -> RunConfig:
    return RunConfig(**{"algorithm": "fedkseed", "K": 16, "local_steps": 6, "lr": 0.5, "seed": 3, **changes})


def update(scalars: list[float], examples: int = 10) -> Update:
    values = np.array(scalars, dtype=np.float32)
    return Update(1, b"d" * 16, Status.FINISHED, len(scalars), examples, 1.0, values, np.zeros(0, np.int64))


def test_clients_draw_different_seeds_and_both_sides_draw_the_same() -> None:
    """Defect elsewhere: every client walks the same seeds (FATE-LLM)."""
    first, again = drawn_seeds(config(), 1, "0", 16, NONE), drawn_seeds(config(), 1, "0", 16, NONE)
    others = [drawn_seeds(config(), r, c, 16, NONE) for r, c in [(1, "1"), (2, "0")]]
    assert first.tolist() == again.tolist()
    assert all(first.tolist() != other.tolist() for other in others)


def test_all_seeds_of_the_pool_are_used() -> None:
    many = np.concatenate([drawn_seeds(config(local_steps=200), 1, str(c), 16, NONE) for c in range(10)])
    counts = np.bincount(many, minlength=16)
    assert counts.min() > 80
    assert counts.max() < 175


def test_the_state_is_the_weighted_mean_of_the_clients_sums() -> None:
    """C_k = -lr * sum_i c_i * sum of client i's scalar gradients along k, c_i = n_i / sum n."""
    algorithm, settings = ALGORITHMS["fedkseed"], config()
    state = algorithm.start(settings, LAYOUT)
    updates = {"0": update([1, 2, 3, 4, 5, 6], 30), "1": update([-1, 0, 1, 0, -1, 0], 10)}
    moved = algorithm.aggregate(state, updates, settings, LAYOUT)
    expected = np.zeros(16)
    for client, share in (("0", 0.75), ("1", 0.25)):
        for k, scalar in zip(drawn_seeds(settings, 1, client, 16, NONE), updates[client].scalars, strict=True):
            expected[k] -= 0.5 * share * scalar
    np.testing.assert_allclose(moved.values[0], expected, rtol=1e-12)
    assert (moved.round, state.round) == (1, 0)
    assert not state.values.any()


def test_a_step_along_several_directions_moves_by_their_mean() -> None:
    """P = 3 slopes a step: C_k = -lr/3 * (sum of the scalar gradients along k), and the weights go there as well."""
    algorithm, settings = ALGORITHMS["fedkseed"], config(directions_per_step=3, local_steps=2, scalar_bits=32, K=5)
    assert len(drawn_seeds(settings, 1, "0", 5, NONE)) == 6
    model = Bowl()
    layout = Layout.of(model)
    state = algorithm.start(settings, layout)
    directions, batches = Directions(layout, state.pool), iter("ab")
    work = LocalWork(model, [model.w], lambda m, b: m(b), batches, directions, Perturbation(model, layout), "0", 9)
    instruction = Instruction(1, b"f" * 16, layout.digest, b"d" * 16, 0, (), NONE)
    sent = algorithm.local_update(work, settings, instruction)
    assert (sent.steps, len(sent.scalars), sent.status) == (2, 6, Status.FINISHED)
    assert list(batches) == []  # one batch a step, for all of its directions
    w = torch.full((6,), 2.0)
    for step, scale in enumerate((1.0, 3.0)):
        ks = drawn_seeds(settings, 1, "0", 5, NONE)[3 * step : 3 * step + 3].tolist()
        z = [torch.zeros(6) for _ in ks]
        for k, row in zip(ks, z, strict=True):
            directions.add([row], k, 1.0)
        slopes = [2.0 * scale * float(w @ row) for row in z]  # of scale * w.w, all at the same w
        np.testing.assert_allclose(sent.scalars[3 * step : 3 * step + 3], slopes, rtol=1e-2, atol=1e-2)
        w = w - 0.5 / 3 * sum(g * row for g, row in zip(sent.scalars[3 * step :].tolist(), z, strict=False))
    torch.testing.assert_close(model.w.detach(), w)
    moved = algorithm.aggregate(state, {"0": sent}, settings, layout)
    rebuilt = [torch.full((6,), 2.0)]
    directions.combine(rebuilt, rebuilt, moved.values.astype(np.float32))
    torch.testing.assert_close(rebuilt[0], w)


class Bowl(torch.nn.Module):
    """scale * w.w, steeper on batch "b"."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((6,), 2.0))

    def forward(self, batch: str) -> torch.Tensor:
        return (3.0 if batch == "b" else 1.0) * (self.w * self.w).sum()


@pytest.mark.parametrize("broken", [2, 3])  # the second slope of the first step, the first of the second
def test_a_step_with_a_slope_that_is_not_finite_is_not_counted(broken: int) -> None:
    algorithm, settings = ALGORITHMS["fedkseed"], config(directions_per_step=2, local_steps=3)
    model = Bowl()
    layout = Layout.of(model)
    directions = Directions(layout, algorithm.start(settings, layout).pool)
    calls = iter(range(100))

    def loss(m: torch.nn.Module, batch: str) -> torch.Tensor:
        return m(batch) * (float("inf") if next(calls) >= 2 * (broken - 1) else 1.0)

    work = LocalWork(model, [model.w], loss, iter("abc"), directions, Perturbation(model, layout), "0", 9)
    sent = algorithm.local_update(work, settings, Instruction(1, b"f" * 16, layout.digest, b"d" * 16, 0, (), NONE))
    steps = (broken - 1) // 2
    assert (sent.status, sent.steps, len(sent.scalars)) == (Status.NOT_FINITE, steps, 2 * steps)


def test_two_identical_clients_move_the_model_as_far_as_one() -> None:
    """Defect elsewhere: sums instead of means (FATE-LLM)."""
    settings = config(weighting="equal")
    raw = update([1, 2, 3, 4, 5, 6])
    assert sum(shares({"0": raw, "1": raw}, settings).values()) == pytest.approx(1.0)


def test_weights_count_the_steps_that_were_done() -> None:
    settings = config()
    part = shares({"0": update([1] * 6, 10), "1": update([1] * 3, 10)}, settings)
    assert part == {"0": pytest.approx(2 / 3), "1": pytest.approx(1 / 3)}
    assert shares({"0": update([], 10)}, settings) == {}


def test_order_of_arrival_does_not_matter() -> None:
    algorithm, settings = ALGORITHMS["fedkseed-pro"], config(algorithm="fedkseed-pro")
    state = algorithm.start(settings, LAYOUT)
    generator = np.random.default_rng(0)
    updates = {str(c): update(generator.standard_normal(6).tolist(), 5 + c) for c in range(5)}
    one = algorithm.aggregate(state, updates, settings, LAYOUT)
    other = algorithm.aggregate(state, dict(reversed(updates.items())), settings, LAYOUT)
    assert one.values.tobytes() == other.values.tobytes()
    assert one.statistics["magnitude"].tobytes() == other.statistics["magnitude"].tobytes()


def test_pro_probabilities_follow_the_published_formula() -> None:
    """p = softmax of the min-max scaled mean |clip(h, 1000)| with one initial zero, checked against plain torch."""
    histories = [[0.0], [0.0, 3.0, -5.0], [0.0, 5000.0], [0.0, -1.0]]
    clipped = [torch.tensor(h).clamp(-1000, 1000).abs() for h in histories]
    s = torch.stack([h.mean() for h in clipped]).double()
    expected = torch.softmax((s - s.min()) / (s.max() - s.min() + 1e-10), 0)
    magnitude = np.array([float(h.sum()) for h in clipped])
    count = np.array([len(h) - 1.0 for h in clipped])
    np.testing.assert_allclose(probabilities(magnitude, count), expected.numpy(), rtol=1e-6)


def test_pro_probabilities_differ_by_a_factor_of_e_at_most() -> None:
    p = probabilities(np.array([0.0, 10.0, 1e5]), np.array([1.0, 3.0, 2.0]))
    assert p.sum() == pytest.approx(1.0)
    assert p.max() / p.min() == pytest.approx(np.e, rel=1e-6)


def test_pro_starts_uniform_and_keeps_statistics_of_single_scalars() -> None:
    algorithm, settings = ALGORITHMS["fedkseed-pro"], config(algorithm="fedkseed-pro")
    state = algorithm.start(settings, LAYOUT)
    weights = algorithm.draw_weights(state)
    assert weights.tolist() == [DRAW_SCALE] * 16
    moved = algorithm.aggregate(state, {"0": update([1, -2, 3, -4, 5, -2000])}, settings, LAYOUT)
    seeds = drawn_seeds(settings, 1, "0", 16, weights)
    magnitude = np.zeros(16)
    np.add.at(magnitude, seeds, [1.0, 2.0, 3.0, 4.0, 5.0, 1000.0])
    np.testing.assert_allclose(moved.statistics["magnitude"], magnitude)
    assert moved.statistics["count"].sum() == 6


def test_pro_draws_follow_the_weights() -> None:
    weights = np.array([60000, 30000, 1] + [1] * 13, dtype=np.uint16)
    drawn = drawn_seeds(config(local_steps=3000), 1, "0", 16, weights)
    shares_drawn = np.bincount(drawn, minlength=16) / 3000
    assert shares_drawn[0] == pytest.approx(2 / 3, abs=0.04)
    assert shares_drawn[1] == pytest.approx(1 / 3, abs=0.04)


def test_a_fresh_pool_closes_the_old_one() -> None:
    algorithm, settings = ALGORITHMS["fedkseed"], config(pool_every=1)
    state = algorithm.aggregate(algorithm.start(settings, LAYOUT), {"0": update([1] * 6)}, settings, LAYOUT)
    fresh = algorithm.begin_round(state, settings, LAYOUT)
    assert len(fresh.closed) == 1
    assert fresh.pool.seed != state.pool.seed
    assert not fresh.values.any()
    assert fresh.closed[0].identity == state.published(settings.coefficient_bits).pools[0].identity
    assert algorithm.begin_round(state, config(), LAYOUT) is state
