"""Directions over tensors: dtype, strides, threads and size change no value, and misuse is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from fedtune.directions import Directions, Pool
from fedtune.directions.host import CHUNK
from fedtune.directions.threads import PIECE, each_tensor, ordered_map
from fedtune.errors import DirectionsError
from fedtune.layout import Layout

K = 8
LARGE = 2 * PIECE + CHUNK + 777
COUNTED = ("hadamard", "rademacher", "gaussian")
COEFFICIENTS = np.arange(-4, 4, dtype=np.float32).reshape(1, K) * np.float32(0.25)


@pytest.fixture(params=COUNTED)
def large(request: pytest.FixtureRequest) -> Directions:
    return Directions(Layout.from_shapes([("a", (LARGE,))]), Pool(request.param, 4, K))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(large: Directions, threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        weights = torch.linspace(-1, 1, LARGE)
        large.add([weights], 3, 0.3)
        large.combine([weights], [weights], COEFFICIENTS / 3)
        results.append((weights, large.project([(0, weights)])))
    for weights, sums in results[1:]:
        assert torch.equal(weights, results[0][0])
        assert np.array_equal(sums, results[0][1])


def test_many_tensors_side_by_side_are_those_in_turn(threads: Callable[[int], None]) -> None:
    shapes = [("large", (LARGE,))] + [(f"t{number}", (PIECE // 3 + number, 2)) for number in range(7)]
    directions = Directions(Layout.from_shapes(shapes), Pool("hadamard", 4, K))
    base = [torch.linspace(-1, 1, math.prod(shape)).view(shape) for _, shape in shapes]
    results = []
    for count in (1, 3):
        threads(count)
        out = [torch.empty_like(tensor) for tensor in base]
        directions.combine(base, out, COEFFICIENTS)
        sums = np.zeros((len(shapes), K))
        directions.over(out, lambda index, sums=sums, out=out: directions.accumulate(sums[index], index, out[index], None))
        results.append((out, sums))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one, other)
    assert np.array_equal(results[0][1], results[1][1])
    assert results[0][1].all()


def test_an_error_in_one_of_many_tensors_arrives(threads: Callable[[int], None]) -> None:
    threads(2)

    def fail(index: int) -> None:
        if index == 3:
            raise DirectionsError("of tensor 3")

    with pytest.raises(DirectionsError, match="of tensor 3"):
        each_tensor(fail, [PIECE] * 5)
    assert list(ordered_map(abs, [-1, -2])) == [1, 2]  # threads are free again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_worked_on_in_float32_and_rounded_once(large: Directions, dtype: torch.dtype) -> None:
    base = torch.linspace(-1, 1, LARGE).to(dtype)
    wide = base.float()
    add, combined = base.clone(), torch.empty_like(base)
    large.add([add], 2, 0.01)
    large.combine([base], [combined], COEFFICIENTS)
    wide_add, wide_combined = wide.clone(), wide.clone()
    large.add([wide_add], 2, 0.01)
    large.combine([wide], [wide_combined], COEFFICIENTS)
    assert torch.equal(add, wide_add.to(dtype))
    assert torch.equal(combined, wide_combined.to(dtype))
    assert np.array_equal(large.project([(0, base)]), large.project([(0, wide)]))


@pytest.mark.parametrize("family", [*COUNTED, "lowrank", "torch", "torch-truncated"])
def test_strided_tensors_have_the_values_of_contiguous_ones(family: str) -> None:
    shape = (9, 70, 80)
    directions = Directions(Layout.from_shapes([("a", shape)]), Pool(family, 4, K))
    plain = torch.linspace(-1, 1, 9 * 70 * 80).reshape(shape)
    strided = plain.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    every_other = torch.zeros(9, 70, 160)[:, :, ::2].copy_(plain)
    for tensor in (strided, every_other):
        assert not tensor.is_contiguous()
    one, out = plain.clone(), torch.empty_like(plain)
    directions.add([one], 5, 0.5)
    directions.combine([one], [out], COEFFICIENTS)
    coordinates = directions.project([(0, plain)])
    for tensor in (strided, every_other):
        assert np.allclose(directions.project([(0, tensor)]), coordinates, atol=1e-3)
        perturbed = torch.empty(shape)
        directions.perturb(0, tensor, perturbed, 5, 0.5)
        assert torch.equal(perturbed, one)
        directions.add([tensor], 5, 0.5)
        assert torch.equal(tensor, one)
        directions.combine([one], [tensor], COEFFICIENTS)
        assert torch.equal(tensor, out)


def test_perturb_reads_the_weight_and_writes_the_scratch() -> None:
    directions = Directions(Layout.from_shapes([("a", (5, 7)), ("b", (7,))]), Pool("hadamard", 4, K))
    weight, out = torch.ones(5, 7), torch.empty(5, 7)
    for k, c in ((1, 0.5), (1, -0.5), (6, 0.25)):
        expected = torch.ones(5, 7)
        directions.add([expected, torch.zeros(7)], k, c)
        directions.perturb(0, weight, out, k, c)
        assert torch.equal(out, expected)
        assert torch.equal(weight, torch.ones(5, 7))
        assert not torch.equal(out, weight)


def test_a_replaced_weight_is_noticed() -> None:
    directions = Directions(Layout.from_shapes([("a", (6,))]), Pool("hadamard", 4, K))
    parameter = torch.nn.Parameter(torch.zeros(6))
    directions.add([parameter.data], 0, 1.0)
    parameter.data = torch.full((6,), 10.0)
    directions.add([parameter.data], 0, 1.0)
    assert (parameter >= 9.0).all()


def test_parameters_that_require_gradients_are_accepted() -> None:
    directions = Directions(Layout.from_shapes([("a", (6,)), ("b", (3,))]), Pool("hadamard", 4, K))
    parameters = [torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]
    directions.add(parameters, 0, 1.0)
    assert [p.abs().unique().tolist() for p in parameters] == [[1.0], [1.0]]
    assert all(p.grad_fn is None and p.requires_grad for p in parameters)


@pytest.mark.parametrize("family", [*COUNTED, "lowrank", "torch", "torch-truncated"])
def test_empty_tensors_are_no_work(family: str) -> None:
    directions = Directions(Layout.from_shapes([("a", (0, 3)), ("b", (2,))]), Pool(family, 4, K))
    tensors = [torch.empty(0, 3), torch.zeros(2)]
    directions.add(tensors, 1, 1.0)
    directions.combine(tensors, tensors, COEFFICIENTS)
    assert directions.project(enumerate(tensors)).shape == (1, K)


def test_misuse_is_refused_by_name() -> None:
    layout = Layout.from_shapes([("a", (6,)), ("b", (2, 3))], "tensor")
    directions = Directions(layout, Pool("hadamard", 4, K))
    good = [torch.zeros(6), torch.zeros(2, 3)]
    for k in (-1, K):
        with pytest.raises(DirectionsError, match=f"no seed number {k}: the pool has {K} seeds, counted from 0"):
            directions.add(good, k, 1.0)
        with pytest.raises(DirectionsError, match="no seed number"):
            directions.perturb(0, good[0], good[0], k, 1.0)
    with pytest.raises(DirectionsError, match="has 2 tensors but 1 were given: pass all trainable tensors"):
        directions.add(good[:1], 0, 1.0)
    with pytest.raises(DirectionsError, match=r"'b' has shape \[2, 3\] in the layout, but a tensor of \[3, 2\] was given"):
        directions.add([good[0], torch.zeros(3, 2)], 0, 1.0)
    with pytest.raises(DirectionsError, match=r"'a' is torch\.float64: directions work on float32, bfloat16 and float16"):
        directions.project([(0, torch.zeros(6, dtype=torch.float64))])
    with pytest.raises(DirectionsError, match=r"must be float32 \[blocks, K\] = \[2, 8\], not float64 \[2, 8\]"):
        directions.combine(good, good, np.zeros((2, K)))
    with pytest.raises(DirectionsError, match=r"not float32 \[1, 8\]"):
        directions.combine(good, good, COEFFICIENTS)
    with pytest.raises(DirectionsError, match="must be finite: a NaN or infinity would spread"):
        directions.combine(good, good, np.full((2, K), np.nan, np.float32))
    with pytest.raises(DirectionsError, match=r"`wanted` must be bool \[blocks, K\] = \[2, 8\], not \[8\]"):
        directions.project([], np.ones(K, bool))
    assert all(not tensor.any() for tensor in good)
