"""The Flower app in pyproject.toml has the settings of RunConfig, and its bundle has the code and nothing else."""

from __future__ import annotations

import io
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.common.config import flatten_dict, parse_config_args

from fedtune.config import RunConfig
from fedtune.methods import RATES
from simulations.engines.flower_app import default_lines, write_app

ROOT = Path(__file__).parents[2]
APP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]


def test_declared_settings_are_those_of_run_config():
    declared = {key: (type(value), value) for key, value in APP["config"].items()}
    expected = {key: (type(field.default), field.default) for key, field in RunConfig.model_fields.items()}
    lines = "\n".join(default_lines())
    assert declared == expected, f"[tool.flwr.app.config] must be:\n{lines}"
    assert list(declared) == list(expected), f"[tool.flwr.app.config] must be in this order:\n{lines}"


@pytest.mark.parametrize("algorithm", RATES)
def test_an_algorithm_given_to_flower_alone_has_its_own_defaults(algorithm):
    """The declared settings leave open what depends on the algorithm: else FedAvg would send its weights in 8 bits."""
    assert RunConfig.from_mapping({**APP["config"], "algorithm": algorithm}) == RunConfig(algorithm=algorithm)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": 'a "quoted" \\ path\t\x7f ü 🙂', "trust_remote_code": True, "seed": 2**63 - 1},
        {"lr": 1e-12, "eps": 1e16, "dirichlet_alpha": 0.1 + 0.2},
    ],
)
def test_settings_survive_toml_and_flower(changes, tmp_path):
    config = RunConfig().replace(**changes)
    write_app(tmp_path / "app", config)
    written = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text(encoding="utf-8"))
    declared = flatten_dict(written["tool"]["flwr"]["app"]["config"])
    assert declared == config.as_mapping()
    assert RunConfig.from_mapping(declared) == config


@pytest.mark.parametrize("preset", sorted((ROOT / "simulations").glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_is_a_run_config_for_flower(preset):
    overrides = parse_config_args([str(preset)])
    assert set(overrides) <= set(APP["config"])
    assert RunConfig.from_mapping({**APP["config"], **overrides}) == RunConfig.load(preset)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's build uses the old name
def test_the_bundle_has_the_code_and_neither_data_nor_tests():
    folders = ("fedtune", "server", "client", "simulations", "tests")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    files = {path.relative_to(ROOT).as_posix(): path for path in [*found, ROOT / "pyproject.toml", ROOT / ".gitignore"]}
    bundle, _ = build_fab_from_files(files)
    packed = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist()) - {"pyproject.toml", ".info/CONTENT"}
    code = {name for name in files if name.startswith(("fedtune/", "server/", "client/")) and name.endswith(".py")}
    assert packed == code
    assert {"fedtune/config.py", "client/app.py"} <= packed
    assert len(bundle) < 2**21
