"""On a CUDA device: a state's model has the bits that it has on the CPU, and training only reads it. Skipped without one."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.coefficients import Coefficients, quantise
from fedtune.config import RunConfig
from fedtune.directions import Directions, Pool
from fedtune.export import load_tuned
from fedtune.layout import Layout
from fedtune.models import LanguageModel, load_model
from fedtune.perturb import WHOLE_LIMIT, Perturbation
from fedtune.replica import Replica
from fedtune.run_folder import RunFolder
from simulations.engines.in_process import run_in_process

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

CUDA = torch.device("cuda", 0)


def load(folder: Path, device: str, dtype: str = "float32") -> LanguageModel:
    return load_model(RunConfig(model=str(folder), device=device, dtype=dtype, threads=1))


def replica_on(folder: Path, device: str, dtype: str) -> Replica:
    model = load(folder, device, dtype).model
    return Replica(model, Layout.of(model, "grouped"))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a.detach().cpu(), b.detach().cpu()) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["hadamard", "rademacher", "gaussian"])
def test_a_replica_has_the_same_bits_on_both_devices(family: str, dtype: str, tiny_folder: Path) -> None:
    replicas = [replica_on(tiny_folder, device, dtype) for device in ("cpu", "cuda")]
    blocks, generator = replicas[0].layout.blocks, np.random.default_rng(3)
    chain = [quantise(Pool(family, n, 32), generator.standard_normal((blocks, 32)) * 1e-3, 8) for n in range(3)]
    for state in (Coefficients(tuple(chain[:1])), Coefficients(tuple(chain))):
        digests = [replica.become(state) for replica in replicas]
        assert digests[0] == digests[1]
        assert same_weights(replicas[0].model, replicas[1].model)
    for index in range(len(replicas[0].weights)):
        assert torch.equal(replicas[1].start(index).cpu(), replicas[0].start(index))


@pytest.mark.parametrize("family", ["hadamard", "gaussian"])
def test_a_run_on_cuda_is_rebuilt_on_the_cpu(family: str, tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    settings = {"model": str(tiny_folder), "data": str(instructions), "out": str(tmp_path / "run"), "device": "cuda"}
    settings |= {"rounds": 2, "clients": 4, "client_fraction": 1.0, "local_steps": 3, "K": 64, "min_samples": 2}
    summary = run_in_process(RunConfig().replace(**settings, family=family))
    assert summary["updates_refused"] == 0
    on_cpu, _, digest = load_tuned(RunFolder.open(tmp_path / "run"))
    assert digest.hex() == summary["digest"]
    base = load(tiny_folder, "cpu")
    assert not same_weights(on_cpu.model, base.model)


@pytest.mark.parametrize("whole_limit", [WHOLE_LIMIT, 0], ids=["whole", "by module"])
@pytest.mark.parametrize("family", ["hadamard", "rademacher", "gaussian", "lowrank"])
def test_a_perturbed_pass_is_that_of_weights_perturbed_in_place(family: str, whole_limit: int, tiny_folder: Path) -> None:
    model = load(tiny_folder, "cuda").model
    layout = Layout.of(model)
    directions, before = Directions(layout, Pool(family, 5, 16)), copy.deepcopy(model)
    in_place, perturbation = copy.deepcopy(model), Perturbation(model, layout, whole_limit)
    directions.add([parameter.data for parameter in in_place.parameters()], 7, 1e-3)
    with torch.no_grad(), perturbation.at(directions, 7, 1e-3):
        loss = loss_of(model)
    assert loss == loss_of(in_place)
    assert loss != loss_of(before)
    assert same_weights(model, before)


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    ids = torch.arange(24, device=CUDA).reshape(2, 12) * 5 % 97
    return float(model(input_ids=ids, labels=ids).loss)
