"""Which kernels are chosen for which device and why: every branch, on a machine that has none of the devices."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator

import pytest
import torch

from fedtune.directions import Pool, choice, make_family
from fedtune.directions.choice import KERNELS, choose_kernels, filler, kernels_note, make_backend
from fedtune.directions.factors import fill
from fedtune.directions.families import FAMILIES
from fedtune.directions.host import HostBackend
from fedtune.directions.products import ProductsBackend
from fedtune.directions.rows import RowsBackend
from fedtune.directions.torch_ops.backend import TorchBackend
from fedtune.directions.torch_ops.factors import fill as fill_by_torch
from fedtune.errors import DirectionsError
from fedtune.layout import Layout

COUNTED = ("hadamard", "rademacher", "gaussian", "lowrank")
CUDA = torch.device("cuda", 0)
LAYOUT = Layout.from_shapes([("a", (4, 5)), ("b", (3,))])


@pytest.fixture
def good_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CUDA device on which Triton can work; a test takes one thing away."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.9.1")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    return monkeypatch


@pytest.fixture(autouse=True)
def _forget_fillers() -> Iterator[None]:
    filler.cache_clear()
    yield
    filler.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cpu_has_numba(family: str) -> None:
    assert choose_kernels(torch.device("cpu"), family) == ("numba", "the tensors are on the CPU")
    assert kernels_note(torch.device("cpu"), family) == "kernels: numba (the tensors are on the CPU)"


@pytest.mark.usefixtures("good_cuda")
@pytest.mark.parametrize("family", COUNTED)
def test_cuda_has_triton(family: str) -> None:
    assert choose_kernels(CUDA, family) == ("triton", "the tensors are on a CUDA device")
    assert kernels_note(CUDA, family) == "kernels: triton (the tensors are on a CUDA device)"


def no_triton(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


LACKS = {
    "an old device": (
        lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5)),
        "the device has compute capability 7.5 and Triton needs 8.0",
    ),
    "no Triton": (
        lambda patch: patch.setattr(importlib.metadata, "version", no_triton),
        "Triton is not installed (pip install 'triton>=3.6')",
    ),
    "an old Triton": (
        lambda patch: patch.setattr(importlib.metadata, "version", lambda name: "3.5.1"),
        "Triton 3.5.1 is older than 3.6",
    ),
    "no compiler": (
        lambda patch: patch.setattr(shutil, "which", lambda name: None),
        "Triton needs a C compiler and there is no gcc or clang",
    ),
    "ROCm": (lambda patch: patch.setattr(torch.version, "cuda", None), "there are no kernels for ROCm"),
}


@pytest.mark.parametrize("family", COUNTED)
@pytest.mark.parametrize("lack", LACKS)
def test_cuda_without_triton_has_torch_operations(lack: str, family: str, good_cuda: pytest.MonkeyPatch) -> None:
    take_away, reason = LACKS[lack]
    take_away(good_cuda)
    expected = f"{reason}, so torch operations work on the device, more slowly than kernels"
    assert choose_kernels(CUDA, family) == ("torch", expected)
    assert kernels_note(CUDA, family) == f"kernels: torch ({expected})"


def test_a_compiler_may_be_named_by_cc_or_be_clang(good_cuda: pytest.MonkeyPatch) -> None:
    good_cuda.setattr(shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    assert choose_kernels(CUDA, "hadamard")[0] == "triton"
    good_cuda.setattr(shutil, "which", lambda name: None)
    good_cuda.setenv("CC", "tcc")
    assert choose_kernels(CUDA, "hadamard")[0] == "triton"


@pytest.mark.parametrize("family", COUNTED)
@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_other_devices_have_torch_operations(device: str, family: str) -> None:
    name, reason = choose_kernels(torch.device(device), family)
    assert name == "torch"
    assert reason == f"there are no kernels for {device}, so torch operations work on the device, more slowly than kernels"


@pytest.mark.usefixtures("good_cuda")
@pytest.mark.parametrize("family", ["torch", "torch-truncated"])
@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_families_that_torch_draws_go_through_host_memory(device: str, family: str) -> None:
    reason = f"family {family} is drawn on the CPU, so tensors go through host memory, slowly"
    assert choose_kernels(torch.device(device), family) == ("host", reason)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_make_backends(family: str) -> None:
    made = make_family(Pool(family, 0, 4), LAYOUT)
    for name in ("numba", "host"):
        assert type(make_backend(name, made)) is (RowsBackend if family == "lowrank" else HostBackend)
    if family in COUNTED:
        assert type(make_backend("torch", made)) is (ProductsBackend if family == "lowrank" else TorchBackend)
    with pytest.raises(DirectionsError, match="no kernels called 'cublas': use one of numba, triton, torch, host"):
        make_backend("cublas", made)
    assert KERNELS == ("numba", "triton", "torch", "host")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(COUNTED)))
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_kernels_that_a_family_lacks_are_refused(name: str, family: str) -> None:
    match = f"Family '{family}' has no {name} kernels, only hadamard, rademacher, gaussian, lowrank have: use 'host'"
    with pytest.raises(DirectionsError, match=match):
        make_backend(name, make_family(Pool(family, 0, 4), LAYOUT))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux only")
def test_triton_backends_are_made_of_their_own_kernels(good_cuda: pytest.MonkeyPatch) -> None:
    gpu = pytest.importorskip("fedtune.directions.gpu.backend")
    from fedtune.directions.gpu.factors import fill as fill_by_triton

    for family in COUNTED:
        backend = make_backend("triton", make_family(Pool(family, 0, 4), LAYOUT))
        assert type(backend) is (ProductsBackend if family == "lowrank" else gpu.TritonBackend)
    assert filler(CUDA) is fill_by_triton
    good_cuda.setattr(shutil, "which", lambda name: None)
    assert filler(CUDA) is fill_by_triton  # kept
    filler.cache_clear()
    assert filler(CUDA) is fill_by_torch


def test_factors_are_made_by_the_kernels_of_the_device() -> None:
    assert filler(torch.device("cpu")) is fill
    assert filler(torch.device("mps")) is fill_by_torch
    assert choice.COUNTED == COUNTED
