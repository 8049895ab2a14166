"""Family lowrank: every rank and shape against the oracle, and what may not change its values."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fedtune.directions import Directions, Pool, engine, host, rows
from fedtune.directions.base import F64
from fedtune.directions.lowrank import Lowrank
from fedtune.directions.oracle import dense
from fedtune.errors import DirectionsError
from fedtune.layout import Layout

K = 5
LAYOUT = Layout.from_shapes(
    [("matrix", (33, 50)), ("bias", (33,)), ("stack", (3, 10, 7)), ("deep", (2, 2, 4, 3)), ("column", (9, 1)), ("row", (1, 9))],
    "tensor",
)
COEFFICIENTS = np.random.default_rng(1).standard_normal((LAYOUT.blocks, K)).astype(np.float32)


def directions(rank: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Directions, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(entry.shape, generator=generator).to(dtype) for entry in LAYOUT.entries]
    return Directions(LAYOUT, Pool("lowrank", 9, K, rank=rank)), tensors


def flat(tensors: list[torch.Tensor]) -> F64:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double().numpy()


@pytest.mark.parametrize("rank", [1, 2, 3, 64])
def test_every_rank_is_that_of_the_oracle(rank: int) -> None:
    found, tensors = directions(rank)
    oracle, sizes = dense(found.pool, LAYOUT), [entry.numel for entry in LAYOUT.entries]
    for k in range(K):
        z = [torch.zeros(entry.shape) for entry in LAYOUT.entries]
        found.add(z, k, 1.0)
        assert np.abs(flat(z) - oracle[k]).max() < 2e-5
        assert [int(torch.linalg.matrix_rank(m)) for m in (z[0], z[2][1], z[3][1, 0], z[4])] == [
            min(rank, most) for most in (33, 7, 3, 1)
        ]
    out = [torch.empty_like(tensor) for tensor in tensors]
    found.combine(tensors, out, COEFFICIENTS)
    expected = (np.repeat(COEFFICIENTS, sizes, axis=0).T * oracle).sum(axis=0)
    assert np.abs(flat(out) - flat(tensors) - expected).max() < 1e-4
    got = found.project(enumerate(tensors))
    for block, (a, b) in enumerate(pairwise(np.cumsum([0, *sizes]))):
        assert np.allclose(got[block], oracle[:, a:b] @ flat(tensors)[a:b], atol=1e-3)


def test_how_rows_are_cut_changes_no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for piece in (rows.ROW_PIECE, 120):
        monkeypatch.setattr(rows, "ROW_PIECE", piece)
        monkeypatch.setattr(host, "PIECE", piece)
        monkeypatch.setattr(engine, "PIECE", piece)
        found, tensors = directions()
        found.add(tensors, 2, 0.3)
        added = flat(tensors)
        found.combine(tensors, tensors, COEFFICIENTS)
        results.append((added, flat(tensors), found.project(enumerate(tensors))))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.allclose(results[0][1], results[1][1], rtol=0, atol=1e-5)
    assert np.allclose(results[0][2], results[1][2], rtol=0, atol=1e-3)


def test_slices_of_a_stack_are_independent_of_one_another() -> None:
    found, _ = directions(1)
    oracle = dense(Pool("lowrank", 0, 2000), Layout.from_shapes([("stack", (2, 2, 2))]))
    products = oracle.T @ oracle / 2000
    assert np.abs(products - np.eye(8)).max() < 5 * np.sqrt(8 / 2000)
    assert found.family.shaped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_worked_on_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    found, base = directions(2, dtype)
    wide = [tensor.float() for tensor in base]
    assert np.array_equal(found.project(enumerate(base)), found.project(enumerate(wide)))
    for act in (lambda t: found.add(t, 2, 0.01), lambda t: found.combine(t, t, COEFFICIENTS)):
        ours, theirs = [t.clone() for t in base], [t.clone() for t in wide]
        act(ours)
        act(theirs)
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(ours, theirs, strict=True))


def test_more_seeds_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, size = Layout.from_shapes([("a", (12, 11)), ("b", (4,))]), 600
    found = Directions(layout, Pool("lowrank", 4, size, rank=2))
    oracle, generator = dense(found.pool, layout), np.random.default_rng(0)
    coefficients = generator.standard_normal((1, size)).astype(np.float32)
    coefficients[0, ::3] = 0.0
    out = [torch.zeros(12, 11), torch.zeros(4)]
    found.combine(out, out, coefficients)
    assert np.abs(flat(out) - coefficients[0] @ oracle).max() < 2e-4
    wanted = generator.random((1, size)) < 0.3
    got = found.project(enumerate(out), wanted)
    assert np.allclose(got, np.where(wanted, oracle @ flat(out), 0.0), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rank", [1, 3, 64])
def test_factors_are_those_that_add_uses(rank: int) -> None:
    found, tensors = directions(rank)
    family, seeds, c = found.family, (4, 0, 4, 2), np.float32(0.3)
    assert isinstance(family, Lowrank)
    for index in (0, 4, 5):
        height, width = LAYOUT.entries[index].shape
        left, right = family.factors(index, seeds, "cpu")
        assert left.shape == (4, min(rank, height, width), height)
        assert right.shape == (4, min(rank, height, width), width)
        for q, k in enumerate(seeds):
            z = torch.zeros(height, width)
            for a, b in zip(left[q], right[q], strict=True):
                z += a[:, None] * b[None, :]
            added = tensors[index].clone()
            found.perturb(index, tensors[index], added, k, float(c))
            assert torch.equal(added, tensors[index] + torch.tensor(c) * z)
    vectors = family.vector(1, seeds, "cpu")
    for q, k in enumerate(seeds):
        added = tensors[1].clone()
        found.perturb(1, tensors[1], added, k, float(c))
        assert torch.equal(added, tensors[1] + torch.tensor(c) * vectors[q])


def test_factors_of_other_shapes_and_seeds_are_refused() -> None:
    family = directions()[0].family
    assert isinstance(family, Lowrank)
    with pytest.raises(DirectionsError, match=r"'bias' has shape \[33\]: factors are those of a tensor of 2 dimensions"):
        family.factors(1, [0], "cpu")
    with pytest.raises(DirectionsError, match=r"'matrix' has shape \[33, 50\]: .* a vector has 1"):
        family.vector(0, [0], "cpu")
    for k in (-1, K):
        with pytest.raises(DirectionsError, match=f"no seed number {k}: the pool has {K} seeds"):
            family.factors(0, [0, k], "cpu")
