"""The Triton kernels, interpreted on the CPU, against the kernels of the CPU and the oracle; and that they compile for GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.directions import Pool, oracle
from tests.directions.interpreted import Call, backend_of, perform

FOLDER = Path(__file__).parent
POOLS = {
    "hadamard": Pool("hadamard", 2**63 + 77, 6),
    "hadamard, tile of 8192": Pool("hadamard", 3, 5000),
    "rademacher": Pool("rademacher", 2**63 + 77, 6),
    "gaussian": Pool("gaussian", 2**63 + 77, 6),
}
ACROSS = (2**33 + 4093, 4099)  # first position and length of a run that touches three tiles
RULES = {"hadamard": oracle.hadamard, "rademacher": oracle.rademacher, "gaussian": oracle.gaussian}


def _version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return (0,)


pytestmark = pytest.mark.skipif(_version() < (3, 6), reason="no Triton of at least 3.6 (Linux only)")
interpreter = pytest.mark.skipif(_version() < (3, 9), reason="Triton's interpreter is older than numpy's rules for scalars")


def values(length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(length).standard_normal(length).astype(np.float32)).to(dtype)


def coefficients(pool: Pool) -> Any:
    """On a grid, with zeros: sums of them are exact."""
    return np.random.default_rng(1).integers(-100, 101, pool.size).astype(np.float32) * np.float32(2**-10)


def operations(pool: Pool) -> dict[str, Any]:
    return {"add": (5, 0.3), "combine": coefficients(pool), "project": None}


def all_calls() -> dict[str, Call]:
    calls = {}
    turned = values(35).reshape(5, 7).T
    for name, pool in POOLS.items():
        for operation, argument in operations(pool).items():
            p0, length = ACROSS
            calls[f"{name}: {operation}, across tiles"] = Call(pool, operation, values(length), p0, argument)
    for family in ("hadamard", "gaussian"):
        for dtype in (torch.bfloat16, torch.float16):
            calls[f"{family}: add, {dtype}"] = Call(POOLS[family], "add", values(257, dtype), 130, (5, 0.3))
    both = ((5, 0.3), (1, -0.07))
    for name, pool in POOLS.items():
        calls[f"{name}: move_and_add, across tiles"] = Call(pool, "move_and_add", values(ACROSS[1]), ACROSS[0], both)
        calls[f"{name}: move_and_add, bfloat16"] = Call(pool, "move_and_add", values(257, torch.bfloat16), 130, both)
    calls["gaussian: move_and_add, float16"] = Call(pool, "move_and_add", values(257, torch.float16), 7, both, strided=True)
    calls["hadamard: move_and_add, strided"] = Call(POOLS["hadamard"], "move_and_add", turned, 0, both)
    pool = POOLS["hadamard"]
    for operation, argument in operations(pool).items():
        calls[f"hadamard: {operation}, one element"] = Call(pool, operation, values(1), 0, argument)
        calls[f"hadamard: {operation}, strided"] = Call(pool, operation, turned, 0, argument, strided=True)
        calls[f"hadamard: {operation}, bfloat16"] = Call(pool, operation, values(257, torch.bfloat16), 65536, argument)
        calls[f"hadamard: {operation}, empty"] = Call(pool, operation, values(0), 0, argument)
    for family in ("hadamard", "rademacher"):
        wanted = np.arange(POOLS[family].size) % 3 == 1
        calls[f"{family}: project, wanted"] = Call(POOLS[family], "project", values(9), 0, wanted)
        calls[f"{family}: project, nothing wanted"] = Call(POOLS[family], "project", values(9), 0, wanted & False)
    edges = torch.tensor([0.0, -0.0, 1e-40, 3e38, -3e38, 65504.0, float("inf"), float("nan")])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        calls[f"hadamard: add, edges in {dtype}"] = Call(pool, "add", edges.to(dtype), 0, (1, 33.0))
    low = Pool("lowrank", 2**63 + 77, 6, rank=2)
    for operation, argument in operations(low).items():
        calls[f"lowrank: {operation}"] = Call(low, operation, values(35).view(5, 7), 0, argument)
    calls["lowrank: add, a vector"] = Call(low, "add", values(9), 0, (5, 0.3))
    calls["lowrank: add, rows of three stretches"] = Call(low, "add", values(2 * 8200).view(2, 8200), 0, (5, 0.3))
    calls["lowrank: add, bfloat16"] = Call(low, "add", values(630, torch.bfloat16).view(9, 70), 0, (5, 0.3), strided=True)
    calls["hadamard: combine, zeros"] = Call(pool, "combine", edges, 0, np.zeros(pool.size, dtype=np.float32))
    return calls


CALLS = all_calls()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("triton")
    torch.save(CALLS, folder / "calls")
    _script("tests.directions.interpreted", str(folder / "calls"), str(folder / "results"), TRITON_INTERPRET="1")
    results: dict[str, Any] = torch.load(folder / "results", weights_only=False)
    return results


def _script(module: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", module, *arguments]
    root = FOLDER.parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@interpreter
@pytest.mark.parametrize("name", CALLS)
def test_kernels_agree_with_those_of_the_cpu(name: str, interpreted: dict[str, Any]) -> None:
    call, got = CALLS[name], interpreted[name]
    expected = perform(backend_of(call, "numba"), call)
    if call.operation == "project":
        assert np.allclose(got, expected, rtol=0, atol=2e-6 * max(1, call.base.numel()) ** 0.75)
        if call.argument is not None:
            assert not got[~call.argument].any()
    elif call.pool.family == "lowrank" and call.operation == "combine" and call.base.dim() > 1:  # a matrix product
        assert torch.allclose(got, expected, rtol=0, atol=1e-5)
    else:
        assert got.dtype == expected.dtype
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
        assert torch.equal(got.signbit(), expected.signbit() & ~got.isnan() | got.signbit() & got.isnan())


@interpreter
@pytest.mark.parametrize("name", POOLS)
def test_kernels_agree_with_the_oracle(name: str, interpreted: dict[str, Any]) -> None:
    pool, (p0, length) = POOLS[name], ACROSS
    positions = np.arange(p0, p0 + length)
    base = values(length).double().numpy()
    seeds = range(pool.size) if pool.size < 8 else [5]
    z = {k: RULES[pool.family](pool, k, positions) for k in seeds}
    added = interpreted[f"{name}: add, across tiles"].double().numpy()
    assert np.abs(added - base - 0.3 * z[5]).max() < 1e-6
    projected = interpreted[f"{name}: project, across tiles"]
    assert np.allclose(projected[list(seeds)], [z[k] @ base for k in seeds], rtol=0, atol=2e-6 * length**0.75)
    if pool.size < 8:
        combined = interpreted[f"{name}: combine, across tiles"].double().numpy()
        total = sum(c * z[k] for k, c in enumerate(coefficients(pool).astype(np.float64)))
        assert np.abs(combined - base - total).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90])
def test_kernels_compile_for_gpus_without_fused_approximate_or_unordered_arithmetic(capability: int, tmp_path: Path) -> None:
    printed = _script(
        "tests.directions.compiled_for_gpu", str(capability), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0"
    )
    lines = [line.split() for line in printed.splitlines()]
    assert len(lines) == 17
    assert all(len(line) == 4 for line in lines), printed


def test_triton_is_imported_by_the_first_tensor_that_needs_it_only() -> None:
    code = "import sys, fedtune.directions, fedtune.directions.choice; print('fedtune.directions.gpu.backend' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
