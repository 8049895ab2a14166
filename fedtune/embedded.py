"""Where the files that ship with fedtune are: inside the installed package `simulations`, whose code is not run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fedtune.errors import ConfigError

SHIPPED = "papers/architectures"
"""Folder of `simulations` with ORG/NAME/config.json of the papers' models."""


def embedded_path(name: str) -> Path:
    """The path of `simulations/embedded/<name>`. Raises ConfigError if this installation lacks it."""
    path = shipped_path(f"embedded/{name}")
    if path is None:
        raise ConfigError(f"'embedded' needs simulations/embedded/{name}, which this installation lacks: install fedtune anew.")
    return path


def shipped_path(name: str) -> Path | None:
    """The path of `simulations/<name>`, or None if the package is not installed or has no such file."""
    spec = find_spec("simulations")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / name
        if path.exists():
            return path
    return None
