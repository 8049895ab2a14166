"""Torch operations on a device: the words, the order of sums, threads, factors, and settings that must not matter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fedtune.directions import Directions, Pool, factors, make_family, products
from fedtune.directions.counters import GAUSSIAN, LEFT, RIGHT
from fedtune.directions.factors import Factor
from fedtune.directions.precision import full_float32
from fedtune.directions.torch_ops import factors as torch_factors
from fedtune.directions.torch_ops import sums
from fedtune.directions.torch_ops.gaussian import _root
from fedtune.directions.torch_ops.hadamard import walsh_hadamard
from fedtune.directions.torch_ops.philox import random_planes
from fedtune.layout import Layout
from fedtune.philox import philox4x32

CPU = torch.device("cpu")


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_words_are_those_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    blocks, seeds = rng.integers(0, 2**62, 50), rng.integers(0, 65536, 50)
    for key in ((0, 0), (2**32 - 1, 2**32 - 1), (0x12345678, 0x9ABCDEF0)):
        got = random_planes(torch.from_numpy(blocks), torch.from_numpy(seeds), 5, key)
        counters = np.stack([blocks & 0xFFFFFFFF, blocks >> 32, seeds, np.full(50, 5)], axis=1).astype(np.uint32)
        assert np.array_equal(torch.stack(got, dim=1).numpy(), philox4x32(counters, key).astype(np.int64))


def test_sums_are_in_one_order_and_have_all_terms() -> None:
    for count in (1, 2, 3, 7, 64, 1000):
        x = torch.arange(3 * count, dtype=torch.float32).view(3, count) + 0.1
        assert torch.equal(sums.ordered_sum(x.double()).round(decimals=6), x.double().sum(1).round(decimals=6))
    pairs = torch.tensor([1.0, 2.0**24, 1.0, -(2.0**24)])  # halves on halves: (1 + 1) + (2^24 - 2^24)
    assert sums.ordered_sum(pairs) == 2.0


def test_square_roots_are_correctly_rounded() -> None:
    x = np.random.default_rng(0).random(100_000, np.float32) * np.float32(45.0)
    assert np.array_equal(_root(torch.from_numpy(x)).numpy(), np.sqrt(x))


def test_the_transform_is_its_own_inverse_and_that_of_the_matrix() -> None:
    eye = walsh_hadamard(torch.eye(8))
    parity = [[(i & j).bit_count() % 2 for j in range(8)] for i in range(8)]
    assert torch.equal(eye, 1.0 - 2.0 * torch.tensor(parity))
    x = torch.randint(-9, 9, (3, 4096)).float()
    assert torch.equal(walsh_hadamard(walsh_hadamard(x)) / 4096, x)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("family", ["hadamard", "rademacher", "gaussian"])
def test_threads_change_no_bit_of_a_large_tensor(family: str) -> None:
    length, results = 70_001, []  # torch shares out operations on more than 32768 elements
    for count in (1, 2):
        torch.set_num_threads(count)
        found = Directions(Layout.from_shapes([("a", (length,))]), Pool(family, 4, 2), "torch")
        weights = torch.linspace(-1, 1, length)
        found.add([weights], 1, 0.3)
        found.combine([weights], [weights], np.array([[0.1, -0.2]], dtype=np.float32))
        results.append((weights, found.project([(0, weights)])))
    assert torch.equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("missing", [True, False])
def test_a_device_without_float64_has_the_same_values(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_has_float64", lambda _: not missing)
    layout, coefficients = Layout.from_shapes([("a", (5000,))]), np.array([[0.5, -0.25]], dtype=np.float32)
    for family in ("hadamard", "gaussian"):
        found, other = (Directions(layout, Pool(family, 1, 2), kernels) for kernels in ("torch", "numba"))
        one, two = torch.zeros(5000), torch.zeros(5000)
        found.combine([one], [one], coefficients)
        other.combine([two], [two], coefficients)
        assert torch.equal(one, two)
        assert np.allclose(found.project([(0, one)]), other.project([(0, two)]), atol=1e-2)
    assert sums._has_float64(torch.device("mps")) is not missing
    monkeypatch.undo()
    assert not sums._has_float64(torch.device("mps"))
    assert sums._has_float64(torch.device("cuda"))


@pytest.mark.parametrize("purpose", [GAUSSIAN, LEFT, RIGHT])
@pytest.mark.parametrize(("p0", "stride", "rank", "length"), [(0, 5, 3, 5), (2**33 + 4093, 4099, 2, 4099), (7, 1, 1, 1)])
def test_factors_are_those_of_the_cpu(purpose: int, p0: int, stride: int, rank: int, length: int) -> None:
    seeds, scales = np.array([4, 0, 4]), np.array([1.0, 0.3, -2.5], dtype=np.float32)
    factor = Factor(purpose, p0, stride, rank, length, seeds, scales, (2**32 - 1, 77))
    made = torch_factors.fill(factor, CPU)
    assert made.shape == (3 * rank, length)
    assert torch.equal(made, factors.fill(factor, CPU))


def test_the_chosen_kernels_make_a_familys_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.from_shapes([("a", (7, 9)), ("b", (5,))])
    family = make_family(Pool("lowrank", 3, 4, rank=2), layout)
    plain = (*family.factors(0, [1, 3], "cpu"), family.vector(1, [1, 3], "cpu"))  # type: ignore[attr-defined]
    asked: list[torch.device] = []

    def choose(device: torch.device) -> factors.Fill:
        asked.append(device)
        return lambda factor, _: torch_factors.fill(factor, CPU)

    monkeypatch.setattr("fedtune.directions.lowrank.filler", choose)
    there = (*family.factors(0, [1, 3], "mps"), family.vector(1, [1, 3], "mps"))  # type: ignore[attr-defined]
    assert asked == [torch.device("mps")] * 2
    assert all(torch.equal(a, b) for a, b in zip(plain, there, strict=True))


# ------------------------------------------------------------------ TF32


def settings() -> tuple[str, str, str]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    )


@pytest.fixture
def _settings_kept() -> Iterator[None]:
    before = settings()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cuda.matmul.fp32_precision = before[1]
    torch.backends.mkldnn.matmul.fp32_precision = before[2]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_settings_kept")
@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_products_are_float32_whatever_is_allowed_elsewhere(asked: str) -> None:
    torch.set_float32_matmul_precision(asked)
    before = settings()
    with full_float32():
        with full_float32():
            assert settings() == ("highest", "ieee", "ieee")
        assert settings() == ("highest", "ieee", "ieee")
        assert not torch.backends.cuda.matmul.allow_tf32
    assert settings() == before
    with pytest.raises(ValueError, match="mine"), full_float32():
        raise ValueError("mine")
    assert settings() == before


@pytest.mark.usefixtures("_settings_kept")
def test_a_setting_that_cannot_be_read_comes_back() -> None:
    """Torch's newer setting alone is set: then the older one is not readable, and "highest"."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    with full_float32():
        assert settings() == ("highest", "ieee", "ieee")
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert torch.get_float32_matmul_precision() == "highest"


def test_every_product_of_lowrank_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[tuple[str, str, str]] = []
    addmm, matmul = torch.Tensor.addmm_, torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *a: (inside.append(settings()), addmm(*a))[1])
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *a: (inside.append(settings()), matmul(*a))[1])
    for kernels in ("numba", "torch"):
        found, weight = Directions(Layout.from_shapes([("a", (6, 5))]), Pool("lowrank", 1, 2), kernels), torch.ones(6, 5)
        found.combine([weight], [weight], np.ones((1, 2), np.float32))
        found.project([(0, weight)])
    assert inside == [("highest", "ieee", "ieee")] * 4
    assert products.ProductsBackend is type(found._backend(weight))
