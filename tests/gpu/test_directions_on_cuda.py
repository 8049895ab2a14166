"""On a CUDA device: every family x kernels x dtype x memory layout against the kernels of the CPU. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from fedtune.directions import Directions, Pool
from fedtune.directions.base import F32
from fedtune.directions.choice import choose_kernels
from fedtune.directions.lowrank import Lowrank
from fedtune.layout import Layout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

CUDA = torch.device("cuda", 0)
K = 6
FAMILIES = ("hadamard", "rademacher", "gaussian", "lowrank")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "transposed": lambda t: torch.empty(t.shape[::-1], dtype=t.dtype).to(t.device).permute(*reversed(range(t.dim()))).copy_(t),
    "sliced": lambda t: torch.zeros(*t.shape, 2, dtype=t.dtype, device=t.device)[..., 1].copy_(t),
}
LAYOUT = Layout.from_shapes(
    [
        ("one", (1,)),
        ("odd", (67,)),
        ("matrix", (127, 65)),
        ("stack", (3, 40, 41)),
        ("large", (5_000_001,)),
        ("wide", (70, 9000)),
    ],
    "tensor",
)
COEFFICIENTS: F32 = np.random.default_rng(2).integers(-99, 100, (LAYOUT.blocks, K)).astype(np.float32) * np.float32(2**-10)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def base(request: pytest.FixtureRequest) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(entry.shape, generator=generator).to(request.param) for entry in LAYOUT.entries]


@pytest.fixture(params=["chosen", "torch"])
def kernels(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "chosen" else "torch"


def make(family: str, kernels: str | None = None, size: int = K) -> Directions:
    return Directions(LAYOUT, Pool(family, 5, size, rank=2), kernels)


def there(tensors: list[torch.Tensor], form: str = "contiguous") -> list[torch.Tensor]:
    return [FORMS[form](tensor.to(CUDA)) for tensor in tensors]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_of_the_cpu(family: str, form: str, kernels: str | None, base: list[torch.Tensor]) -> None:
    """`add` to the bit, `combine` too but for lowrank's products, `project` to the rounding of float32 sums."""
    cpu, cuda, weights = make(family), make(family, kernels), there(base, form)
    added, on_device = [tensor.clone() for tensor in base], there(base, form)
    cpu.add(added, 3, 0.3)
    cuda.add(on_device, 3, 0.3)
    assert equal(on_device, added)
    combined, out = [torch.empty_like(tensor) for tensor in base], there(base, form)
    cpu.combine(base, combined, COEFFICIENTS)
    cuda.combine(weights, out, COEFFICIENTS)
    for ours, theirs in zip(out, combined, strict=True):
        if family == "lowrank":
            torch.testing.assert_close(ours.cpu(), theirs, rtol=torch.finfo(theirs.dtype).eps, atol=1e-5)
        else:
            assert torch.equal(ours.cpu(), theirs)
    assert equal(weights, base)
    ours, theirs = cuda.project(enumerate(weights)), cpu.project(enumerate(base))
    for block, entry in enumerate(LAYOUT.entries):
        assert np.allclose(ours[block], theirs[block], rtol=0, atol=4e-6 * entry.numel**0.75)


@pytest.mark.parametrize("size", [1, 4096, 5000, 65536])
def test_hadamard_has_the_bits_of_the_cpu_for_every_tile(size: int, kernels: str | None) -> None:
    coefficients = np.zeros((LAYOUT.blocks, size), np.float32)
    coefficients[:, :: max(1, size // 40)] = 0.125
    tensors = [torch.zeros(entry.shape) for entry in LAYOUT.entries]
    out, on_device = [torch.empty_like(t) for t in tensors], there(tensors)
    make("hadamard", size=size).combine(tensors, out, coefficients)
    make("hadamard", kernels, size).combine(on_device, on_device, coefficients)
    assert equal(on_device, out)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wanted_part_of_the_coordinates(family: str, kernels: str | None) -> None:
    deltas = [torch.linspace(-1, 1, max(entry.numel, 2))[: entry.numel].view(entry.shape) for entry in LAYOUT.entries]
    wanted = np.random.default_rng(0).random((LAYOUT.blocks, K)) < 0.5
    ours = make(family, kernels).project(enumerate(there(deltas)), wanted)
    assert not ours[~wanted].any()
    assert np.allclose(ours, make(family).project(enumerate(deltas), wanted), rtol=0, atol=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_calls_give_the_same_bits(family: str, kernels: str | None) -> None:
    deltas = there([torch.linspace(-1, 1, max(entry.numel, 2))[: entry.numel].view(entry.shape) for entry in LAYOUT.entries])
    found = make(family, kernels)
    assert np.array_equal(found.project(enumerate(deltas)), found.project(enumerate(deltas)))


@pytest.mark.parametrize("family", [*FAMILIES, "torch", "torch-truncated"])
def test_tensors_of_one_model_on_two_devices(family: str) -> None:
    layout = Layout.from_shapes([("a", (300, 20)), ("b", (70,)), ("c", (5000,))])
    found, coefficients = Directions(layout, Pool(family, 5, K)), COEFFICIENTS[:1]
    host = [torch.ones(entry.shape) for entry in layout.entries]
    mixed = [tensor.to(CUDA if index % 2 == 0 else "cpu") for index, tensor in enumerate(host)]
    found.add(host, 2, 0.3)
    found.add(mixed, 2, 0.3)
    assert equal(mixed, host)
    crossed = [torch.empty_like(tensor, device="cpu" if tensor.is_cuda else CUDA) for tensor in mixed]
    out = [torch.empty_like(tensor) for tensor in host]
    found.combine(mixed, crossed, coefficients)
    found.combine(host, out, coefficients)
    for ours, theirs in zip(crossed, out, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-5 if family == "lowrank" else 0)
    assert np.allclose(found.project(enumerate(mixed)), found.project(enumerate(host)), rtol=0, atol=0.01)
    scratch = torch.empty(300, 20)
    found.perturb(0, mixed[0], scratch, 1, 0.5)  # from one device to the other
    expected = torch.empty(300, 20)
    found.perturb(0, host[0], expected, 1, 0.5)
    assert torch.equal(scratch, expected)


def test_factors_of_lowrank_have_the_bits_of_the_cpu() -> None:
    family = make("lowrank").family
    assert isinstance(family, Lowrank)
    for index in (2, 5):
        for ours, theirs in zip(family.factors(index, [4, 0, 5], CUDA), family.factors(index, [4, 0, 5], "cpu"), strict=True):
            assert ours.device == CUDA
            assert torch.equal(ours.cpu(), theirs)
    for index in (0, 1, 4):
        assert torch.equal(family.vector(index, [3, 1], CUDA).cpu(), family.vector(index, [3, 1], "cpu"))


@pytest.fixture
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_tf32")
def test_products_are_not_tf32_where_it_is_allowed(kernels: str | None) -> None:
    weights = [torch.zeros(entry.shape) for entry in LAYOUT.entries]
    out, on_device = [torch.empty_like(t) for t in weights], there(weights)
    make("lowrank").combine(weights, out, COEFFICIENTS)
    make("lowrank", kernels).combine(on_device, on_device, COEFFICIENTS)
    for ours, theirs in zip(on_device, out, strict=True):  # TF32 would be off by some 1e-4
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=2e-6)
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("family", FAMILIES)
def test_the_choice_is_one_of_the_devices_own(family: str) -> None:
    name, reason = choose_kernels(CUDA, family)
    assert name in ("triton", "torch")
    assert reason
