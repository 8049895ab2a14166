"""Tensors that no kernels can work on are refused by name, with what is supported, before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedtune.directions import Combination, Directions, Pool
from fedtune.directions.families import FAMILIES
from fedtune.errors import DirectionsError
from fedtune.layout import Layout

LAYOUT = Layout.from_shapes([("first", (3,)), ("second", (4, 4))])
COEFFICIENTS = np.ones((1, 2), np.float32)
DTYPE = r"'second' is {}: directions work on float32, bfloat16 and float16 tensors"
SPARSE = r"'second' has the layout {}: directions work on dense tensors \(torch\.strided\); call to_dense\(\) first"
META = r"'second' is on the device meta, where tensors have no values: directions work on cpu, cuda, mps and xpu; load"

REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "float64": (lambda: torch.zeros(4, 4, dtype=torch.float64), DTYPE.format(r"torch\.float64")),
    "int64": (lambda: torch.zeros(4, 4, dtype=torch.int64), DTYPE.format(r"torch\.int64")),
    "bool": (lambda: torch.zeros(4, 4, dtype=torch.bool), DTYPE.format(r"torch\.bool")),
    "complex": (lambda: torch.zeros(4, 4, dtype=torch.complex64), DTYPE.format(r"torch\.complex64")),
    "float8": (lambda: torch.zeros(4, 4, dtype=torch.float8_e4m3fn), DTYPE.format(r"torch\.float8_e4m3fn")),
    "sparse": (lambda: torch.eye(4).to_sparse(), SPARSE.format(r"torch\.sparse_coo")),
    "sparse rows": (lambda: torch.eye(4).to_sparse_csr(), SPARSE.format(r"torch\.sparse_csr")),
    "meta": (lambda: torch.empty(4, 4, device="meta"), META),
    "meta, 16 bits": (lambda: torch.empty(4, 4, device="meta", dtype=torch.bfloat16), META),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kernels", [None, "torch", "host"])
@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_without_kernels_are_refused(kind: str, kernels: str | None) -> None:
    make, message = REFUSED[kind]
    for family in ("hadamard", "lowrank"):
        directions, first, bad = Directions(LAYOUT, Pool(family, 1, 2), kernels), torch.zeros(3), make()
        good = torch.zeros(4, 4)
        calls: list[Callable[[], object]] = [
            lambda: directions.perturb(1, bad, good, 0, 1.0),  # noqa: B023 - called at once
            lambda: directions.perturb(1, good, bad, 0, 1.0),  # noqa: B023
            lambda: directions.add([first, bad], 0, 1.0),  # noqa: B023
            lambda: directions.combine([first, bad], [first, good], COEFFICIENTS),  # noqa: B023
            lambda: directions.combine([first, good], [first, bad], COEFFICIENTS),  # noqa: B023
            lambda: directions.project([(1, bad)]),  # noqa: B023
            lambda: Combination([(directions, COEFFICIENTS)]).write(1, bad, good),  # noqa: B023
            lambda: Combination([(directions, COEFFICIENTS)] * 2).write(1, good, bad),  # noqa: B023
        ]
        for call in calls:
            with pytest.raises(DirectionsError, match=message):
                call()
        assert not first.any()
        assert not good.any()


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.whole])
def test_families_that_torch_draws_refuse_the_same(family: str) -> None:
    directions = Directions(LAYOUT, Pool(family, 1, 2))
    for make, message in REFUSED.values():
        if make().layout is torch.strided:
            with pytest.raises(DirectionsError, match=message):
                directions.combine([torch.zeros(3), make()], [torch.zeros(3), torch.zeros(4, 4)], COEFFICIENTS)
            with pytest.raises(DirectionsError, match=message):
                directions.project([(1, make())])


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux only")
def test_triton_kernels_refuse_host_memory() -> None:
    pytest.importorskip("triton")
    for family, shape in (("hadamard", (3,)), ("gaussian", (3,)), ("lowrank", (4, 4))):
        directions = Directions(Layout.from_shapes([("a", shape)]), Pool(family, 1, 2), "triton")
        weight = torch.zeros(shape)
        match = r"Triton kernels work on tensors of a CUDA device, not on cpu: use kernels 'torch', or none to let"
        with pytest.raises(DirectionsError, match=match):
            directions.add([weight], 0, 1.0)
        with pytest.raises(DirectionsError, match=match):
            directions.project([(0, weight)])
        assert not weight.any()
