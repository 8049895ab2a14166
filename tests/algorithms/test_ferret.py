"""Ferret: allocation of coordinates, scales, schedule and aggregation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.algorithms import ALGORITHMS
from fedtune.algorithms.ferret import allocate, chosen_seeds, pool_size, scales, server_rate
from fedtune.config import RunConfig
from fedtune.layout import Layout
from fedtune.wire import Status, Update

LAYOUT = Layout.from_shapes([("a", (8,)), ("b", (6, 2)), ("c", (40,))], "tensor")


def config(**changes: object) -> RunConfig:
    return RunConfig(**{"algorithm": "ferret", "K": 12, "seed": 5, "rounds": 4, **changes})


def update(counts: list[int], values: list[float], examples: int = 10) -> Update:
    floats = np.array(values, dtype=np.float32)
    return Update(1, b"d" * 16, Status.FINISHED, 50, examples, 1.0, floats, np.array(counts, dtype=np.int64))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e6, width=32), st.integers(1, 5000)), min_size=1, max_size=30),
    st.integers(1, 3000), st.integers(1, 512), st.sampled_from(["norm", "norm-sqrt-size", "uniform"]),
)  # fmt: skip
def test_allocation_spends_the_budget_within_the_caps(
    blocks: list[tuple[float, int]], total: int, pool: int, rule: str
) -> None:
    norms, sizes = (np.array(column) for column in zip(*blocks, strict=True))
    counts = allocate(norms.astype(np.float64), sizes, total, pool, rule)
    caps = np.where(norms > 0, np.minimum(sizes, pool), 0)
    assert (counts >= 0).all()
    assert (counts <= caps).all()
    assert counts.sum() == min(total, caps.sum())


def test_allocation_is_in_proportion() -> None:
    norms, sizes = np.array([1.0, 2.0, 1.0]), np.array([100, 100, 400])
    assert allocate(norms, sizes, 40, 512, "norm").tolist() == [10, 20, 10]
    assert allocate(norms, sizes, 50, 512, "norm-sqrt-size").tolist() == [10, 20, 20]
    assert allocate(norms, sizes, 30, 512, "uniform").tolist() == [10, 10, 10]


def test_norm_sqrt_size_has_the_least_expected_error() -> None:
    """Expected squared error of the unbiased rebuild: sum_l ||delta_l||^2 d_l / K_l."""
    norms, sizes = np.array([1.0, 0.3, 5.0, 2.0]), np.array([4096, 128, 11008, 32768])

    def error(rule: str) -> float:
        counts = allocate(norms, sizes, 400, 4096, rule)
        return float((norms**2 * sizes / np.maximum(counts, 1)).sum())

    assert error("norm-sqrt-size") < error("norm") < error("uniform")


def test_seeds_are_the_clients_own_and_nested_in_nothing_sent() -> None:
    counts = np.array([3, 0, 5])
    mine, again = chosen_seeds(config(), 1, "0", counts, 16), chosen_seeds(config(), 1, "0", counts, 16)
    assert mine.sum(axis=1).tolist() == [3, 0, 5]
    assert (mine == again).all()
    assert (mine != chosen_seeds(config(), 1, "1", counts, 16)).any()
    assert (mine != chosen_seeds(config(), 2, "0", counts, 16)).any()


def test_scales() -> None:
    counts, sizes = np.array([4, 10]), np.array([12, 90])
    assert scales(counts, sizes, "unbiased").tolist() == [0.25, 0.1]
    assert scales(counts, sizes, "shrunken").tolist() == [1 / 16, 1 / 100]


def test_schedules_start_at_server_lr_and_fall() -> None:
    for anneal, last in (("none", 3.0), ("linear", 0.75), ("cosine", 3.0 * 0.5 * (1 + np.cos(0.75 * np.pi)))):
        rates = [server_rate(config(anneal=anneal, server_lr=3.0), number) for number in (1, 2, 3, 4)]
        assert rates[0] == 3.0
        assert rates[-1] == pytest.approx(last)
        assert rates == sorted(rates, reverse=True)


def test_aggregation_is_the_weighted_sum_of_scaled_coordinates() -> None:
    algorithm, asked = ALGORITHMS["ferret"], config(server_lr=2.0)
    state = algorithm.start(asked, LAYOUT)
    updates = {"0": update([2, 0, 1], [1.0, -2.0, 4.0], 30), "1": update([1, 1, 0], [8.0, 0.5], 10)}
    moved = algorithm.aggregate(state, updates, asked, LAYOUT)
    expected = np.zeros_like(state.values)
    for client, share in (("0", 0.75), ("1", 0.25)):
        counts = updates[client].counts
        wanted = chosen_seeds(asked, 1, client, counts, state.pool.size)
        table = np.zeros_like(expected)
        table[wanted] = updates[client].scalars
        expected += 2.0 * share * table / np.maximum(counts, 1)[:, None]
    np.testing.assert_allclose(moved.values, expected, rtol=1e-12)


def test_momentum_repeats_the_last_step() -> None:
    algorithm, asked = ALGORITHMS["ferret"], config(momentum=0.5)
    first = algorithm.aggregate(algorithm.start(asked, LAYOUT), {"0": update([1, 0, 0], [4.0])}, asked, LAYOUT)
    second = algorithm.aggregate(first, {"0": update([0, 0, 0], [])}, asked, LAYOUT)
    np.testing.assert_allclose(second.values, 1.5 * first.values)


def test_pool_has_room_for_uneven_blocks() -> None:
    assert pool_size(config(K=12), LAYOUT) == 12
    assert pool_size(config(K=2200), Layout.from_shapes([(str(i), (4096,)) for i in range(41)], "tensor")) == 256
    assert pool_size(config(K=2200, pool_size=64), LAYOUT) == 64
