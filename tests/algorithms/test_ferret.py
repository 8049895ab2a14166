"""Ferret: allocation of coordinates, scales, schedule and aggregation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.algorithms import ALGORITHMS
from fedtune.algorithms.base import server_rate
from fedtune.algorithms.coordinates import allocate, most_coordinates, pool_size
from fedtune.algorithms.ferret import check_update, chosen_seeds, clip_pieces, scales
from fedtune.config import RunConfig
from fedtune.errors import ContradictionError, MalformedMessageError
from fedtune.layout import Layout
from fedtune.wire import Status, Update

LAYOUT = Layout.from_shapes([("a", (8,)), ("b", (6, 2)), ("c", (40,))], "tensor")
SIZES = np.array(LAYOUT.block_sizes)


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


# ------------------------------------------------------------------ the official code's choices


def test_official_allocation_is_a_cap_for_the_block_that_moved_most() -> None:
    """K_l = max(int(norm_l / max(largest norm, 1e-8) * pool), 2), whatever the total and the sizes of the blocks."""
    norms, sizes = np.array([1.0, 0.5, 0.499, 0.001, 0.0]), np.array([3, 400, 400, 400, 400])
    assert allocate(norms, sizes, 7, 128, "official").tolist() == [128, 64, 63, 2, 2]
    assert allocate(norms * 1e-9, sizes, 7, 128, "official").tolist() == [12, 6, 6, 2, 2]
    assert allocate(np.zeros(2), sizes[:2], 7, 128, "official").tolist() == [2, 2]
    assert allocate(np.ones(1), sizes[:1], 7, 65536, "official").tolist() == [65535]


def test_with_the_official_allocation_k_is_the_pool() -> None:
    asked = config(allocation="official", K=20)
    assert pool_size(asked, LAYOUT) == 20
    assert most_coordinates(asked, LAYOUT) == 3 * 20
    assert most_coordinates(config(K=20), LAYOUT) == 20
    assert most_coordinates(config(K=300, pool_size=20), LAYOUT) == 8 + 12 + 20
    with pytest.raises(ContradictionError, match="takes K = 20 as the size of the pool: remove pool_size"):
        config(allocation="official", K=20, pool_size=10)


def test_official_scale_is_a_third() -> None:
    assert scales(np.array([4, 10, 0]), np.array([12, 90, 5]), "official").tolist() == [1 / 12, 1 / 30, 1.0]


def test_official_pieces_are_clipped_to_norm_ten_and_momentum_keeps_what_was_clipped() -> None:
    sizes = np.array([4, 25])
    clipped = clip_pieces(np.array([[4.9, -5.0, 7.0], [1.9, 2.1, -8.0]]), sizes)
    assert clipped.tolist() == [[4.9, -5.0, 5.0], [1.9, 2.0, -2.0]]
    algorithm, asked = ALGORITHMS["ferret"], config(reconstruction="official", momentum=0.5, server_lr=2.0)
    limit = 10.0 / np.sqrt(40)
    first = algorithm.aggregate(algorithm.start(asked, LAYOUT), {"0": update([0, 0, 1], [9.0])}, asked, LAYOUT)
    assert sorted(first.values[2])[-1] == pytest.approx(2.0 * limit)
    second = algorithm.aggregate(first, {"0": update([0, 0, 0], [])}, asked, LAYOUT)
    assert second.statistics["velocity"].max() == pytest.approx(1.5)
    assert sorted(second.values[2])[-1] == pytest.approx(2.0 * limit + 2.0 * min(1.5, limit))
    unclipped = algorithm.aggregate(first, {"0": update([0, 0, 0], [])}, config(momentum=0.5, server_lr=2.0), LAYOUT)
    assert sorted(unclipped.values[2])[-1] == pytest.approx(2.0 * limit + 2.0 * 1.5)


def test_momentum_and_schedules_are_those_of_the_official_code() -> None:
    """Its server, restated: `seed_pool *= momentum`, `+= grad * weight`, then `param -= slr * seed_pool * base`, each round."""
    algorithm = ALGORITHMS["ferret"]
    for anneal in ("none", "linear", "cosine"):
        asked = config(momentum=0.9, server_lr=3.0, anneal=anneal)
        state, decayed, model = algorithm.start(asked, LAYOUT), np.zeros((3, 12)), np.zeros((3, 12))
        for number in (1, 2, 3, 4):
            sent = {
                str(c): replace(update([2, 1, 1], [1.0 + c, -2.0, 0.5, number * 1.0], 10 * (c + 1)), round=number)
                for c in (0, 1)
            }
            decayed *= 0.9
            for c, weight in ((0, 1 / 3), (1, 2 / 3)):
                table = np.zeros((3, 12))
                table[chosen_seeds(asked, number, str(c), sent[str(c)].counts, 12)] = sent[str(c)].scalars
                decayed += weight * table / np.array([2.0, 1.0, 1.0])[:, None]
            factor = {"none": 1.0, "linear": 1 - (number - 1) / 4, "cosine": (1 + np.cos(np.pi * (number - 1) / 4)) / 2}[anneal]
            model += 3.0 * factor * decayed
            state = algorithm.aggregate(state, sent, asked, LAYOUT)
        np.testing.assert_allclose(state.values, model, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------- counts that are believed


ALLOCATIONS = ["norm", "norm-sqrt-size", "uniform", "official"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=3, max_size=3),
    st.sampled_from(ALLOCATIONS), st.integers(2, 400), st.integers(0, 60),
)  # fmt: skip
def test_whatever_a_client_allocates_is_accepted(norms: list[float], rule: str, total: int, size: int) -> None:
    asked = config(K=total, pool_size=0 if rule == "official" else size, allocation=rule)
    counts = allocate(np.array(norms), SIZES, asked.K, pool_size(asked, LAYOUT), rule)
    if counts.any():
        check_update(update(counts.tolist(), [1.0] * int(counts.sum())), asked, LAYOUT)


@pytest.mark.parametrize(
    ("counts", "changes", "text"),
    [
        ([0, 0, 0], {}, "no coordinates: nothing moved, so it has no share"),
        ([4, 4, 13], {}, "21 coordinates; 20 were asked for"),
        ([4, 4, 11], {}, "19 coordinates; 20 were asked for"),
        ([1, 0, 0], {}, "1 coordinates; 20 were asked for"),
        ([9, 4, 7], {}, "Block 0 has 9 coordinates, of 8 at most"),
        ([8, 12, 21], {"K": 300, "pool_size": 20}, "Block 2 has 21 coordinates, of 20 at most"),
        ([8, 11, 20], {"K": 300, "pool_size": 20}, "39 coordinates; 40 were asked for"),
        ([1, 20, 20], {"allocation": "official"}, "fewer than 2 coordinates"),
        ([2, 20, 21], {"allocation": "official"}, "Block 2 has 21 coordinates, of 20 at most"),
    ],
)
def test_counts_that_nobody_allocates_are_refused(counts: list[int], changes: dict[str, object], text: str) -> None:
    with pytest.raises(MalformedMessageError, match=text):
        check_update(update(counts, [1.0] * sum(counts)), config(**{"K": 20, **changes}), LAYOUT)


def test_less_than_the_budget_is_right_where_every_block_that_moved_is_full() -> None:
    asked = config(K=300, pool_size=20)
    for counts in ([8, 12, 20], [8, 0, 0], [0, 12, 20]):
        check_update(update(counts, [1.0] * sum(counts)), asked, LAYOUT)
