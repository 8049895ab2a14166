"""Fixtures of the experiments' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import preset


@pytest.fixture
def tiny_preset(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Path:
    """A preset on the tiny model."""
    return preset(tmp_path / "tiny.toml", tiny_folder, instructions)
