"""One table: every family x every law of a direction, against the dense float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions import Directions, Pool, make_family
from fedtune.directions.base import F32, F64
from fedtune.directions.families import FAMILIES
from fedtune.directions.oracle import dense
from fedtune.errors import DirectionsError
from fedtune.layout import Layout

ALL = tuple(FAMILIES)
RANDOM = tuple(name for name in ALL if name != "axes")
COUNTED = ("hadamard", "rademacher", "gaussian")  # counter-based: a value depends on its position only
PLACED = (*COUNTED, "lowrank")  # counter-based: a value does not depend on other tensors
DRAWN = ("torch", "torch-truncated")  # drawn by torch's generator, as the official codes do
EXACT = tuple(name for name, family in FAMILIES.items() if family.exact)
# Values of gaussian are within 3e-4 of the exact transform (see cpu/gaussian.py), nearly all within 1e-6.
# Those of lowrank are products of two. Those of torch-truncated are rounded twice to float32 on their way to sqrt(3) at
# most: the factor, and the product.
VALUE_ERROR = {
    "hadamard": 0.0,
    "rademacher": 0.0,
    "gaussian": 3e-6,
    "lowrank": 2e-5,
    "torch": 0.0,
    "torch-truncated": 2.1e-7,
    "axes": 0.0,
}
K = 6
LAYOUT = Layout.from_shapes(
    [("scalar", ()), ("vector", (67,)), ("matrix", (64, 71)), ("one", (1,)), ("stack", (3, 40, 41))], "tensor"
)


@pytest.fixture(params=ALL)
def directions(request: pytest.FixtureRequest) -> Directions:
    return Directions(LAYOUT, Pool(request.param, 2**63 + 77, K))


@pytest.fixture(scope="module")
def oracles() -> dict[str, F64]:
    return {name: dense(Pool(name, 2**63 + 77, K), LAYOUT) for name in ALL}


def zeros() -> list[torch.Tensor]:
    return [torch.zeros(entry.shape) for entry in LAYOUT.entries]


def normals(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(entry.shape, generator=generator) for entry in LAYOUT.entries]


def flat(tensors: list[torch.Tensor]) -> F64:
    return torch.cat([t.reshape(-1) for t in tensors]).double().numpy()


def parts(row: F64) -> Iterator[F64]:
    """The pieces of a dense row that belong to the tensors."""
    return iter(np.split(row, np.cumsum([entry.numel for entry in LAYOUT.entries])[:-1]))


def grid(seed: int, blocks: int) -> F32:
    """Coefficients on a power-of-two grid: sums of them are exact in float32."""
    return np.random.default_rng(seed).integers(-100, 101, (blocks, K)).astype(np.float32) * np.float32(2**-10)


# ------------------------------------------------------------------ against the oracle


def test_add_is_one_product_and_one_sum_in_float32(directions: Directions, oracles: dict[str, F64]) -> None:
    name, c = directions.pool.family, 0.3
    for k in range(K):
        z = zeros()
        directions.add(z, k, 1.0)
        assert np.abs(flat(z) - oracles[name][k]).max() <= VALUE_ERROR[name]
        weights, base = normals(k), normals(k)
        directions.add(weights, k, c)
        for after, before, direction in zip(weights, base, z, strict=True):
            product = direction.numpy() * np.float32(c)  # rounded: a fused multiply-add would differ
            assert np.array_equal(after.numpy(), before.numpy() + product)


def test_combine_is_the_sum_over_the_pool(directions: Directions, oracles: dict[str, F64]) -> None:
    coefficients = grid(1, LAYOUT.blocks)
    coefficients[:, 2] = 0.0
    base, out = normals(3), zeros()
    directions.combine(base, out, coefficients)
    per_element = np.repeat(coefficients, [entry.numel for entry in LAYOUT.entries], axis=0)
    expected = (per_element.T * oracles[directions.pool.family]).sum(axis=0)
    assert np.abs(flat(out) - flat(base) - expected).max() < 1e-5
    assert np.array_equal(flat(base), flat(normals(3)))
    directions.combine(base, base, coefficients)
    assert np.array_equal(flat(base), flat(out))


def test_project_is_the_product_with_every_direction(directions: Directions, oracles: dict[str, F64]) -> None:
    deltas = normals(4)
    got = directions.project(enumerate(deltas))
    assert got.shape == (LAYOUT.blocks, K)
    assert got.dtype == np.float64
    for k in range(K):
        for block, (z, delta) in enumerate(zip(parts(oracles[directions.pool.family][k]), deltas, strict=True)):
            assert got[block, k] == pytest.approx(z @ delta.double().numpy().reshape(-1), abs=2e-6 * delta.numel() ** 0.75)


def test_project_leaves_out_what_is_not_wanted(directions: Directions) -> None:
    wanted = np.random.default_rng(0).random((LAYOUT.blocks, K)) < 0.5
    everything, some = directions.project(enumerate(normals(4))), directions.project(enumerate(normals(4)), wanted)
    expected = np.where(wanted, everything, 0.0)
    if directions.family.shaped:  # a matrix product of fewer rows may be rounded otherwise
        assert np.allclose(some, expected, rtol=0, atol=1e-4)
        assert not some[~wanted].any()
    else:
        assert np.array_equal(some, expected)


def test_blocks_share_coefficients() -> None:
    shapes = [(entry.name, entry.shape) for entry in LAYOUT.entries]
    for name in (*PLACED, "torch"):  # torch-truncated draws by block, so other blocks have other directions
        pool = Pool(name, 1, K)
        one, each = Directions(Layout.from_shapes(shapes), pool), Directions(LAYOUT, pool)
        assert np.allclose(one.project(enumerate(normals(1)))[0], each.project(enumerate(normals(1))).sum(axis=0))


# ------------------------------------------------------------------ E[z z^T] = I


# Standard deviation of z_i z_j over 1: at most that of z_i^2, sqrt(2) for normals and sqrt(8) for products of two.
SPREAD = {"hadamard": 1.0, "rademacher": 1.0, "gaussian": 1.5, "torch": 1.5, "torch-truncated": 1.5, "lowrank": 3.0}


@pytest.mark.parametrize("name", RANDOM)
def test_directions_have_mean_zero_and_unit_covariance_over_pool_seeds(name: str) -> None:
    layout = Layout.from_shapes([("a", (5000,)), ("b", (3,))])
    picked = [0, 1, 2, 31, 32, 127, 128, 4095, 4096, 4999, 5000, 5002] if name in COUNTED else list(range(12))
    if name not in COUNTED:
        layout = Layout.from_shapes([("a", (4, 2)), ("b", (3,)), ("c", (2, 3, 2))])
    count = 3000
    values = np.empty((count, 2, len(picked)))
    for seed in range(count):
        directions = Directions(layout, Pool(name, seed, K))
        for which, k in enumerate((seed % K, (seed + 1) % K)):
            z = [torch.zeros(entry.shape) for entry in layout.entries]
            directions.add(z, k, 1.0)
            values[seed, which] = flat(z)[picked]
    bound = 5.0 / np.sqrt(count)
    assert np.abs(values.mean(axis=0)).max() < bound
    first, second = values[:, 0], values[:, 1]
    covariance = first.T @ first / count
    assert np.abs(covariance - np.eye(len(picked))).max() < bound * SPREAD[name]
    between = first.T @ second / count
    if name == "hadamard":  # row 0 of the Walsh-Hadamard matrix is +1: seeds of a pool agree where a tile starts
        starts = [picked.index(0), picked.index(4096), picked.index(5000)]
        assert np.array_equal(between[starts, starts], np.ones(3))
        between[starts, starts] = 0.0
    assert np.abs(between).max() < bound


@pytest.mark.parametrize("name", ALL)
def test_pools_with_other_names_have_other_directions(name: str) -> None:
    rows = {}
    for family in COUNTED:
        for seed in (0, 1, 2**32):
            z = zeros()
            Directions(LAYOUT, Pool(family, seed, K)).add(z, 1, 1.0)
            rows[family, seed] = np.sign(flat(z))
    row = rows.pop((name, 0), None)
    if row is None:
        z = zeros()
        Directions(LAYOUT, Pool(name, 0, K)).add(z, 1, 1.0)
        row = np.sign(flat(z))
    for other in rows.values():
        assert abs(row @ other) < 5.0 * np.sqrt(len(row))


# ------------------------------------------------------------------ what a value may not depend on


@pytest.mark.parametrize("name", COUNTED)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_values_do_not_depend_on_how_a_run_is_cut(name: str, data: st.DataObject) -> None:
    length, p0 = data.draw(st.integers(0, 10_000)), data.draw(st.sampled_from([0, 1, 4095, 4097, 65536, 2**34 + 5]))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    bounds = list(zip([0, *cuts], [*cuts, length], strict=True))
    family = make_family(Pool(name, 3, K), LAYOUT)
    base = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    whole, pieces = np.empty_like(base), np.empty_like(base)
    family.add(whole, base, p0, 2, 0.3)
    for a, b in bounds:
        family.add(pieces[a:b], base[a:b], p0 + a, 2, 0.3)
    assert np.array_equal(whole, pieces)
    coefficients = grid(5, 1)[0]
    family.combine(whole, base, p0, coefficients)
    for a, b in bounds:
        family.combine(pieces[a:b], base[a:b], p0 + a, coefficients)
    assert np.array_equal(whole, pieces)
    sums, joined = np.zeros(K), np.zeros(K)
    family.project(sums, base, p0, None)
    for a, b in bounds:
        family.project(joined, base[a:b], p0 + a, None)
    assert np.allclose(sums, joined, atol=1e-3)


@pytest.mark.parametrize("name", PLACED)
def test_values_do_not_depend_on_the_other_tensors(name: str) -> None:
    alone = Directions(Layout.from_shapes([("a", (300,)), ("b", (5, 5))]), Pool(name, 3, K))
    more = Directions(Layout.from_shapes([("a", (299,)), ("b", (5, 5)), ("c", (70_000,))]), Pool(name, 3, K))
    one, other = torch.zeros(5, 5), torch.zeros(5, 5)
    alone.perturb(1, one, one, 4, 1.0)
    more.perturb(1, other, other, 4, 1.0)
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_calls_and_an_earlier_seed_change_nothing(name: str) -> None:
    directions = Directions(LAYOUT, Pool(name, 3, K))
    forward, backward = zeros(), zeros()
    directions.add(forward, 4, 1.0)
    directions.add(zeros(), 1, 1.0)
    for index in reversed(range(len(backward))):
        directions.perturb(index, backward[index], backward[index], 4, 1.0)
    assert np.array_equal(flat(forward), flat(backward))


@pytest.mark.parametrize("name", EXACT)
def test_combine_is_the_sum_of_adds_to_the_bit_on_grid_coefficients(name: str) -> None:
    directions = Directions(LAYOUT, Pool(name, 3, K))
    coefficients = grid(8, LAYOUT.blocks)
    combined, added = zeros(), zeros()
    directions.combine(combined, combined, coefficients)
    for k in range(K):
        for index, tensor in enumerate(added):
            directions.perturb(index, tensor, tensor, k, float(coefficients[index, k]))
    assert np.array_equal(flat(combined), flat(added))


# ------------------------------------------------------------------ pools


def test_only_torchs_draws_are_walked_seed_by_seed() -> None:
    assert tuple(name for name in ALL if FAMILIES[name].whole) == DRAWN
    assert [name for name in ALL if FAMILIES[name].fast_combine] == ["hadamard", "axes"]


def test_an_unknown_family_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(DirectionsError, match="no family 'sparse': use one of hadamard, rademacher, gaussian, lowrank, torch"):
        Directions(LAYOUT, Pool("sparse", 0, 4))
    with pytest.raises(DirectionsError, match="oracle knows no family 'sparse'"):
        dense(Pool("sparse", 0, 4), LAYOUT)


def test_a_pool_larger_than_the_largest_tile_is_refused() -> None:
    assert Pool("hadamard", 0, 65536).size == 65536
    for size in (0, 65537):
        with pytest.raises(DirectionsError, match=f"1 to 65536 seeds, not {size}: lower K"):
            Pool("hadamard", 0, size)
    with pytest.raises(DirectionsError, match="has 3 seeds but 2 candidates were given"):
        Pool("torch", 0, 3, (1, 2))
    assert Pool("lowrank", 0, 4, rank=256).rank == 256
    for rank in (0, 257):
        with pytest.raises(DirectionsError, match=f"A direction has rank 1 to 256, not {rank}: change rank"):
            Pool("lowrank", 0, 4, rank=rank)


def test_identities_differ() -> None:
    pools = [Pool("hadamard", 0, 4), Pool("hadamard", 1, 4), Pool("hadamard", 0, 5), Pool("gaussian", 0, 4)]
    pools += [Pool("lowrank", 0, 4), Pool("lowrank", 0, 4, rank=2)]
    pools += [Pool("torch", 0, 2), Pool("torch", 0, 2, (1, 2)), Pool("torch", 0, 2, (2, 1))]
    assert len({pool.identity for pool in pools}) == len(pools)
    assert {len(pool.identity) for pool in pools} == {8}
