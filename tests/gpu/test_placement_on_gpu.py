"""Models whose weights stay in host memory, or are spread over devices, beside one that is on one GPU as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedtune.algorithms.zeroth_order import two_point
from fedtune.config import RunConfig
from fedtune.resident import Resident

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def slopes(folder: Path, data: Path, **changes: object) -> list[float]:
    """What the first step of a client measures along three directions, and the loss."""
    settings = {"model": str(folder), "data": str(data), "device": "cuda", "max_length": 64, "template": "plain", "K": 16}
    config = RunConfig.from_mapping({**settings, "clients": 2, "min_samples": 2, "eps": 1e-3, **changes})
    here = Resident(config)
    state = here.algorithm.start(config, here.replica.layout)
    work = here.work(config, "0", here.data.clients[0], 1, state.published(config.coefficient_bits))
    gradients, loss = two_point(work, [1, 5, 5], config.eps)
    assert gradients[1] == gradients[2]
    return [*gradients, loss]


@pytest.mark.parametrize("family", ["hadamard", "lowrank"])
def test_an_offloaded_model_measures_the_same(family: str, tiny_folder: Path, instructions: Path) -> None:
    plain = slopes(tiny_folder, instructions, family=family)
    assert slopes(tiny_folder, instructions, family=family, offload=True) == pytest.approx(plain, rel=1e-2, abs=1e-2)
    here = Resident(RunConfig(model=str(tiny_folder), device="cuda", offload=True))
    assert all(weight.device.type == "cpu" for weight in here.replica.weights)
    assert here.replica.perturbation.device == torch.device("cuda", 0)


def test_a_spread_model_measures_the_same(tiny_folder: Path, instructions: Path) -> None:
    pytest.importorskip("accelerate")
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    plain = slopes(tiny_folder, instructions)
    assert slopes(tiny_folder, instructions, device="auto", device_map="balanced") == pytest.approx(plain, rel=1e-2, abs=1e-2)
