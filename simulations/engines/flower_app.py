"""fedtune as a Flower app: the settings as TOML lines, and an app folder that runs whatever fedtune is installed.

`python -m simulations.engines.flower_app` prints the lines that belong under [tool.flwr.app.config] in pyproject.toml:
Flower refuses a run config key that is not declared there, so every setting has to be, with its default.
"""

from __future__ import annotations

from pathlib import Path

import fedtune
from fedtune import toml
from fedtune.config import RunConfig

# The components relay what the run says and how it fails to the process that started it; see relay.py.
_APP = """\
[project]
name = "fedtune"
version = "{version}"
description = "A run of the installed fedtune"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "simulations.engines.relay_server:app"
clientapp = "simulations.engines.relay_client:app"

[tool.flwr.app.config]
{config}
"""


def config_lines(config: RunConfig) -> list[str]:
    """`key = value` in TOML for every setting, in the order of declaration."""
    return [f"{key} = {toml.written(value)}" for key, value in config.as_mapping().items()]


def default_lines() -> list[str]:
    """`key = value` for every setting as it is where it is not given: what depends on the algorithm is left open."""
    return [f"{key} = {toml.written(field.default)}" for key, field in RunConfig.model_fields.items()]


def write_app(folder: Path, config: RunConfig) -> None:
    """Make `folder` a Flower app whose run config is `config`. It holds no code: the components are installed packages."""
    folder.mkdir()
    text = _APP.format(version=fedtune.__version__, config="\n".join(config_lines(config)))
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    print("\n".join(default_lines()))
