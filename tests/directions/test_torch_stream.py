"""Families torch and torch-truncated: to the bit what the official codes draw, and torch's global generator is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtune.directions import Directions, Pool, make_family
from fedtune.directions.threads import PIECE
from fedtune.directions.torch_stream import candidate_seeds, truncated_normal
from fedtune.errors import DirectionsError
from fedtune.layout import Layout
from fedtune.seeds import Stream

SHAPES = [("embedding", (50, 16)), ("norm", (7,)), ("square", (16, 16)), ("last", (3, 5, 2))]
LAYOUT = Layout.from_shapes(SHAPES)
SEEDS = (0, 7, 2**32 - 1, 2**32 + 7, 10**11 - 1)


def official(seed: int) -> list[torch.Tensor]:
    """zhenqincn/FedKSeed, optimizers/mezo_optimizer.py: reseed, then one draw per parameter in order."""
    torch.manual_seed(seed)
    return [torch.normal(mean=0, std=1, size=shape, dtype=torch.float32) for _, shape in SHAPES]


@pytest.fixture
def directions() -> Directions:
    return Directions(LAYOUT, Pool("torch", 0, len(SEEDS), SEEDS))


def test_directions_are_the_official_draws_to_the_bit(directions: Directions) -> None:
    for k, seed in enumerate(SEEDS):
        z = [torch.zeros(shape) for _, shape in SHAPES]
        directions.add(z, k, 1.0)
        for mine, theirs in zip(z, official(seed), strict=True):
            assert torch.equal(mine, theirs)


def test_the_seed_is_cut_to_32_bits_as_torch_does(directions: Directions) -> None:
    a, b = (torch.zeros(50, 16) for _ in range(2))
    directions.perturb(0, a, a, 1, 1.0)
    directions.perturb(0, b, b, 3, 1.0)
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["torch", "torch-truncated"])
def test_the_global_generator_is_left_alone(family: str) -> None:
    directions = Directions(LAYOUT, Pool(family, 0, len(SEEDS), SEEDS))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    directions.add([torch.zeros(shape) for _, shape in SHAPES], 2, 1.0)
    directions.project(enumerate(torch.ones(shape) for _, shape in SHAPES))
    assert torch.equal(torch.get_rng_state(), before)


def test_combine_and_project_walk_the_official_seeds(directions: Directions) -> None:
    coefficients = np.array([[0.5, 0.0, -1.25, 0.0, 2.0]], np.float32)
    base, out = [torch.ones(shape) for _, shape in SHAPES], [torch.empty(shape) for _, shape in SHAPES]
    directions.combine(base, out, coefficients)
    draws = [official(seed) for seed in SEEDS]
    for index, got in enumerate(out):
        expected = 1.0 + sum(float(c) * z[index].double() for c, z in zip(coefficients[0], draws, strict=True))
        assert torch.allclose(got.double(), expected, atol=1e-6)
    got = directions.project(enumerate(base))[0]
    assert np.allclose(got, [sum(z.double().sum().item() for z in draw) for draw in draws], atol=1e-9)


def test_candidates_come_from_the_pool_seed_when_none_are_given() -> None:
    drawn = candidate_seeds(Pool("torch", 9, 100))
    assert list(drawn) == Stream(9, "candidates").below(10**11, 100).tolist()
    assert max(drawn) > 2**32
    assert candidate_seeds(Pool("torch", 9, 2, (4, 5))) == (4, 5)


def test_a_run_over_two_tensors_is_refused() -> None:
    family = make_family(Pool("torch", 0, 2), LAYOUT)
    with pytest.raises(DirectionsError, match="no values at positions 0 to 800: a run must lie in one tensor"):
        family.add(np.zeros(801, np.float32), np.zeros(801, np.float32), 0, 0, 1.0)
    values = np.zeros(4, np.float32)
    family.combine(values, values, LAYOUT.entries[1].origin + 3, np.ones(2, np.float32))
    assert np.count_nonzero(values) == 4


# ------------------------------------------------------------------ torch-truncated

GROUPED = Layout.from_shapes([(name, shape) for name, shape in SHAPES], "grouped")


def official_base(seed: int, size: int) -> torch.Tensor:
    """allen4747/Ferret, optimizers/ferret_optimizer.py: reseed for each group, then one draw of the whole group."""
    torch.manual_seed(seed)
    return torch.nn.init.trunc_normal_(torch.empty(size), mean=0.0, std=1.0, a=-(1 / size**0.5), b=1 / size**0.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_bases_are_ferrets_draws_to_the_bit(seed: int) -> None:
    for size in (1, 3, 7, 64, 2048, 30_001):
        assert torch.equal(truncated_normal(seed, size), official_base(seed, size))


def test_a_truncated_direction_is_one_base_for_each_block_scaled_to_unit_variance() -> None:
    assert [entry.block for entry in GROUPED.entries] == [0, 1, 2, 3]
    joined = Layout.from_shapes([("a", (2, 3)), ("b", (3,)), ("c", (400,)), ("d", (300,)), ("e", (310,))], "grouped")
    assert [entry.block for entry in joined.entries] == [0, 0, 1, 2, 3]
    for layout in (GROUPED, joined):
        directions = Directions(layout, Pool("torch-truncated", 0, len(SEEDS), SEEDS))
        for k, seed in enumerate(SEEDS):
            z = [torch.zeros(entry.shape) for entry in layout.entries]
            directions.add(z, k, 1.0)
            for block, size in enumerate(layout.block_sizes):
                own = [t.reshape(-1) for t, entry in zip(z, layout.entries, strict=True) if entry.block == block]
                assert torch.equal(torch.cat(own), official_base(seed, size) * (3.0 * size) ** 0.5)


def test_the_variance_of_a_base_is_a_third_of_what_the_official_scale_takes_it_for() -> None:
    """Ferret's official code scales by d / K_l, right for variance 1/d: its rebuild is one third of the update."""
    size = 40_000
    assert float(truncated_normal(3, size).square().sum()) == pytest.approx(1 / 3, rel=4 / size**0.5)


@pytest.mark.parametrize("family", ["torch", "torch-truncated"])
def test_threads_change_no_bit_of_a_tensor_in_pieces(family: str) -> None:
    layout = Layout.from_shapes([("large", (3 * PIECE + 5,)), ("small", (7,))])
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            directions = Directions(layout, Pool(family, 0, len(SEEDS), SEEDS))
            weights = [torch.zeros(entry.shape) for entry in layout.entries]
            for k in range(len(SEEDS)):
                directions.add(weights, k, 0.5)
            results.append((*weights, torch.from_numpy(directions.project(enumerate(weights)))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
