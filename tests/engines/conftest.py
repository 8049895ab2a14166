"""A run of a few seconds: the tiny model, 80 instructions, four clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.config import RunConfig, Scalar

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def small(tiny_folder: Path, instructions: Path, tmp_path: Path) -> MakeConfig:
    """The config of a small run that writes to `name` in the test's folder."""

    def make(name: str, **changes: Scalar) -> RunConfig:
        return RunConfig().replace(
            **{
                "model": str(tiny_folder),
                "data": str(instructions),
                "out": str(tmp_path / name),
                "device": "cpu",
                "threads": 1,
                "rounds": 2,
                "clients": 4,
                "client_fraction": 1.0,
                "local_steps": 3,
                "K": 64,
                "min_samples": 2,
                "max_length": 256,
                **changes,
            }
        )

    return make
