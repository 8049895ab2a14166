"""A real run folder to begin from: two rounds of the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.resident import release
from tests.laws.federation import config, run


@pytest.fixture(scope="session")
def run_folder(tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of FedKSeed with a fresh pool a round, so that a pool is closed. Read only."""
    out = tmp_path_factory.mktemp("fuzz") / "run"
    release()
    run(config("fedkseed-fresh", tiny_folder, instructions, out, rounds=2, eval_samples=4, local_steps=2, generate_samples=1))
    return out
