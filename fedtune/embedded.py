"""Where the model and the tasks that ship with fedtune are: inside the installed package `simulations`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fedtune.errors import ConfigError


def embedded_path(name: str) -> Path:
    """The path of `simulations/embedded/<name>`, found without running any code of that package.

    Raises:
        ConfigError: the package is not installed, or the file is not in it.
    """
    spec = find_spec("simulations")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / "embedded" / name
        if path.exists():
            return path
    raise ConfigError(f"'embedded' needs simulations/embedded/{name}, which this installation lacks: install fedtune anew.")
