"""One table: every family x kernels x dtype x memory layout x threads, against the oracle and, to the bit, each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch

from fedtune.directions import Directions, Pool, engine, host, make_family, oracle, rows
from fedtune.directions.base import F32, F64
from fedtune.directions.choice import make_backend
from fedtune.directions.torch_ops import backend
from fedtune.layout import Layout

K, TILE = 6, 4096
FAMILIES = ("hadamard", "rademacher", "gaussian", "lowrank")
KERNELS = ("numba", "torch")  # Triton's are in test_triton.py, since its interpreter needs a process of its own
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: torch.empty(t.shape, dtype=t.dtype).copy_(t),
    "transposed": lambda t: torch.empty(t.shape[::-1], dtype=t.dtype).permute(*reversed(range(t.dim()))).copy_(t),
    "sliced": lambda t: torch.zeros(*t.shape, 3, dtype=t.dtype)[..., 1].copy_(t),
}
LAYOUT = Layout.from_shapes(
    [("one", (1,)), ("odd", (67,)), ("tile", (64, 64)), ("two", (127, 65)), ("three", (3 * TILE - 1,)), ("stack", (3, 40, 41))],
    "tensor",
)
# Half a unit in the last place of the dtype, relative; float32 is compared with float64 arithmetic of exact directions.
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
VALUE_ERROR = {"hadamard": 0.0, "rademacher": 0.0, "gaussian": 3e-6, "lowrank": 2e-5}
COEFFICIENTS: F32 = np.random.default_rng(2).integers(-99, 100, (LAYOUT.blocks, K)).astype(np.float32) * np.float32(2**-10)


@cache
def dense(family: str) -> list[F64]:
    """float64 [K, n] for each tensor."""
    ends = np.cumsum([entry.numel for entry in LAYOUT.entries])[:-1]
    return np.split(oracle.dense(Pool(family, 5, K, rank=2), LAYOUT), ends, axis=1)


@cache
def normals(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(entry.shape, generator=generator).to(dtype) for entry in LAYOUT.entries]


def directions(family: str, kernels: str | None) -> Directions:
    return Directions(LAYOUT, Pool(family, 5, K, rank=2), kernels)


@cache
def expected(family: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], F64]:
    """(add, combine, project) on contiguous float32 tensors by the kernels of the CPU; the tensors rounded to `dtype`."""
    found, base = directions(family, None), [tensor.float() for tensor in normals(dtype)]
    added, combined = [tensor.clone() for tensor in base], [torch.empty_like(tensor) for tensor in base]
    found.add(added, 3, 0.3)
    found.combine(base, combined, COEFFICIENTS)
    return [t.to(dtype) for t in added], [t.to(dtype) for t in combined], found.project(enumerate(base))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors of three tiles are worked on in pieces, by several threads."""
    for module, names in ((host, ("ALIGN", "CHUNK", "PIECE")), (engine, ("PIECE",))):
        for name in names:
            monkeypatch.setattr(module, name, TILE)
    monkeypatch.setattr(backend, "CHUNK", 2 * TILE)
    monkeypatch.setattr(rows, "ROW_PIECE", TILE)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_operations(family: str, kernels: str, dtype: torch.dtype, form: str) -> None:
    check(family, kernels, dtype, form)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_with_two_threads(family: str, kernels: str) -> None:
    check(family, kernels, torch.float32, "contiguous")


def check(family: str, kernels: str, dtype: torch.dtype, form: str) -> None:
    """One cell of the table: `add`, `combine` and `project` of every tensor of the layout."""
    found, base = directions(family, kernels), [FORMS[form](tensor) for tensor in normals(dtype)]
    out, added = [FORMS[form](torch.zeros_like(tensor)) for tensor in base], [FORMS[form](tensor) for tensor in base]
    found.add(added, 3, 0.3)
    found.combine(base, out, COEFFICIENTS)
    projected = found.project(enumerate(base))
    to_the_bit = expected(family, dtype)
    for index, tensor in enumerate(base):
        assert torch.equal(tensor, normals(dtype)[index])
        assert torch.equal(added[index], to_the_bit[0][index])
        if family != "lowrank":  # which sums in the order of its matrix products
            assert torch.equal(out[index], to_the_bit[1][index])
        z, values = dense(family)[index], tensor.double().numpy().reshape(-1)
        close(added[index], values + np.float32(0.3) * z[3], VALUE_ERROR[family])
        close(out[index], values + COEFFICIENTS[index].astype(np.float64) @ z, 10 * VALUE_ERROR[family])
        assert np.allclose(projected[index], z @ values, rtol=0, atol=4e-6 * len(values) ** 0.75)


def close(got: torch.Tensor, exact: F64, error: float) -> None:
    bound = error + ROUNDING[got.dtype] * np.abs(exact) + 2e-7
    assert (np.abs(got.double().numpy().reshape(-1) - exact) <= bound).all()


@pytest.mark.parametrize("p0", [1, TILE - 1, 2**33 + 4093])
@pytest.mark.parametrize("size", [6, 5000], ids=["tile of 4096", "tile of 8192"])
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_odd_offsets(family: str, size: int, p0: int) -> None:
    """Runs of 1 to 3 tiles that start anywhere: torch operations against the kernels of the CPU, those against the oracle."""
    family_of, seeds = make_family(Pool(family, 7, size), LAYOUT), [0, 5]
    coefficients = np.zeros(size, np.float32)
    coefficients[seeds] = 0.25, -0.5
    wanted = coefficients != 0
    for length in (1, TILE, 2 * TILE + 77, 3 * TILE):
        base = torch.from_numpy(np.random.default_rng(length).standard_normal(length).astype(np.float32))
        results = []
        for kernels in KERNELS:
            work, sums, added, combined = make_backend(kernels, family_of), np.zeros(size), base.clone(), base.clone()
            work.add(added, base, p0, 5, 0.3)
            work.combine(combined, base, p0, coefficients)
            work.project(sums, base, p0, wanted)
            results.append((added, combined, sums))
        (added, combined, sums), other = results
        assert torch.equal(added, other[0])
        assert torch.equal(combined, other[1])
        assert np.allclose(sums, other[2], rtol=0, atol=4e-6 * length**0.75)
        assert not sums[~wanted].any()
        assert not other[2][~wanted].any()
        picked = np.unique(np.linspace(0, length - 1, 50).astype(np.int64))
        z = {k: getattr(oracle, family)(Pool(family, 7, size), k, p0 + picked) for k in seeds}
        values = base.double().numpy()[picked]
        assert np.abs(added.numpy()[picked] - values - np.float32(0.3) * z[5]).max() < 1e-6
        assert np.abs(combined.numpy()[picked] - values - 0.25 * z[0] + 0.5 * z[5]).max() < 2e-6
