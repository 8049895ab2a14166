"""Settings: what is refused and how it is said, what paths become, and that every preset is valid."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import get_args

import pytest

from fedtune.config import RunConfig
from fedtune.errors import ConfigError, ContradictionError, UnknownSettingError
from fedtune.methods import ADAMW_RATES, RATES, RELATIVE
from fedtune.source_names import expand

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path for path in (ROOT / "simulations").rglob("*.toml") if path.parent.name != "comparisons")


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ({"learning_rate": 1}, UnknownSettingError, "no setting 'learning_rate'. Did you mean 'lr'"),
        ({"local_step": 1}, UnknownSettingError, "Did you mean 'local_steps'"),
        ({"rouunds": 1}, UnknownSettingError, "Did you mean 'rounds'"),
        ({"xyzzy": 1}, UnknownSettingError, "lists them"),
        ({"lr": -1}, ConfigError, "'lr' = -1"),
        ({"lr": "fast"}, ConfigError, "'lr' = 'fast'"),
        ({"algorithm": "fedsgd"}, ConfigError, "'fedkseed', 'fedkseed-pro'"),
        ({"clients": 3, "clients_per_round": 4}, ContradictionError, "there are only 3 clients"),
        ({"holdout_category": "a", "holdout_file": "b"}, ContradictionError, "exclude each other"),
        ({"algorithm": "ferret", "momentum": 0.9, "pool_every": 1}, ContradictionError, "needs one pool"),
        ({"optimizer": "adamw"}, ContradictionError, "optimizer = adamw needs gradients, which fedkseed does not have"),
        ({"algorithm": "ferret", "local_momentum": 0.5}, ContradictionError, "belongs to optimizer = momentum, not to sgd"),
        ({"momentum": 0.9}, ContradictionError, "momentum belongs to ferret"),
        ({"update_rounding": "master"}, ContradictionError, "is for 16-bit weights: remove it, or set dtype to bfloat16"),
        ({"offload": True, "algorithm": "ferret"}, ContradictionError, "offload is for passes without gradients"),
        ({"offload": True, "device_map": "auto"}, ContradictionError, "offload and device_map exclude each other"),
        (
            {"offload": True, "dtype": "float16", "update_rounding": "master"},
            ContradictionError,
            "offload and update_rounding = master exclude each other",
        ),
        ({"device_map": "auto", "device": "cpu"}, ContradictionError, "device_map places the model itself"),
        ({"server_lr": 3.0}, ContradictionError, "by definition"),
        ({"clip_norm": 1.0}, ContradictionError, "clip_norm belongs to ferret and .*, not to fedkseed: remove it"),
        ({"algorithm": "fedkseed-pro", "accumulate": 4}, ContradictionError, "accumulate belongs to ferret"),
        ({"algorithm": "ferret", "eps": 1e-3}, ContradictionError, "eps belongs to fedkseed and .*, not to ferret"),
        ({"weight_decay": 0.1}, UnknownSettingError, "no setting 'weight_decay'. `fedtune"),
        ({"algorithm": "ferret", "directions_per_step": 2}, ContradictionError, "directions_per_step belongs to fedkseed"),
        ({"coefficient_bits": 32}, ContradictionError, "coefficient_bits = 32, but fedkseed has 2 to 24: change it"),
        ({"algorithm": "fedavg", "coefficient_bits": 1}, ContradictionError, "but fedavg has 2 to 32"),
        ({"algorithm": "local", "server_lr": 0.5}, ContradictionError, "server_lr belongs to .*, not to local: remove it"),
        ({"only_client": "1"}, ContradictionError, "only_client belongs to local, not to fedkseed"),
        ({"algorithm": "fedzo", "local_steps": 65537}, ContradictionError, "65537 directions in a round; a pool has 65536"),
        ({"algorithm": "fedavg", "offload": True}, ContradictionError, "offload is for passes without gradients, and fedavg"),
        ({"algorithm": "fedavg", "K": 2200}, ContradictionError, "K = 2200 says nothing in fedavg, which has no seed pool"),
        ({"algorithm": "lora", "family": "gaussian"}, ContradictionError, "family = gaussian says nothing in lora"),
        ({"algorithm": "decomfl", "pool_every": 5}, ContradictionError, "directions are new in every round: remove it"),
        ({"rank": 2}, ContradictionError, "rank belongs to family lowrank, not to hadamard: remove it or set family"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_fix(values: dict[str, object], kind: type[ConfigError], text: str) -> None:
    with pytest.raises(kind, match=text):
        RunConfig.from_mapping(values)


def test_what_depends_on_the_algorithm_is_filled_in() -> None:
    """A config says what is used: bits that were not set, and settings of pools where an algorithm chooses its own."""
    assert (RunConfig().coefficient_bits, RunConfig().scalar_bits) == (8, 16)
    full = RunConfig(algorithm="fedavg")
    assert (full.coefficient_bits, full.scalar_bits, full.K, full.pool_every) == (32, 32, 1024, 0)
    assert RunConfig(algorithm="decomfl").pool_every == 1
    assert RunConfig(algorithm="fedzo", family="lowrank", rank=2).rank == 2


@pytest.mark.parametrize("algorithm", get_args(RunConfig.model_fields["algorithm"].annotation))
def test_a_rate_that_is_not_given_is_that_of_the_method_and_its_optimizer(algorithm: str) -> None:
    own, usual = RunConfig(algorithm=algorithm), {**RATES, **RELATIVE}[algorithm]
    assert own.lr == RunConfig(algorithm=algorithm, lr=0.0).lr == usual > 0.0
    assert own.as_mapping()["lr"] == usual, "what is recorded is what is used"
    assert f"{usual:g}" in str(RunConfig.model_fields["lr"].description)
    assert RunConfig(algorithm=algorithm, lr=0.5).lr == 0.5
    assert RunConfig(algorithm=algorithm, lr=0.5).replace(seed=1).lr == 0.5
    if algorithm in RELATIVE:
        assert {own.replace(optimizer=rule).lr for rule in ("sgd", "momentum", "adamw")} == {usual}
    elif own.first_order:
        assert own.replace(optimizer="momentum").lr == pytest.approx(usual / 10)
        assert own.replace(optimizer="adamw").lr == ADAMW_RATES[algorithm]


def test_the_optimizer_and_the_pools_are_the_methods_own() -> None:
    usual = {name: RunConfig(algorithm=name) for name in ("fedkseed", "ferret", "subspace")}
    assert {name: (own.optimizer, own.pool_every, own.coordinates) for name, own in usual.items()} == {
        "fedkseed": ("sgd", 0, "own"), "ferret": ("sgd", 0, "own"), "subspace": ("sgd", 1, "shared"),
    }  # fmt: skip
    assert RunConfig(algorithm="subspace", optimizer="sgd", pool_every=3).pool_every == 3
    assert usual["subspace"].replace(algorithm="ferret") == RunConfig(algorithm="ferret")
    for name, own in usual.items():  # what a run folder has recorded is read again
        assert RunConfig.from_mapping(own.as_mapping()) == own, name
    with pytest.raises(ContradictionError, match="coordinates belongs to ferret and subspace, not to fedkseed"):
        RunConfig(coordinates="shared")


def test_a_rate_that_was_not_given_follows_the_method() -> None:
    assert RunConfig(algorithm="fedavg").replace(algorithm="ferret") == RunConfig(algorithm="ferret")
    assert RunConfig(algorithm="fedavg", lr=0.25).replace(algorithm="ferret").lr == 0.25


def test_the_bounds_ask_one_client_and_central_does_the_steps_of_all() -> None:
    asked = {"clients": 8, "clients_per_round": 3, "local_steps": 5}
    central, local, fedavg = (RunConfig(algorithm=name, **asked) for name in ("central", "local", "fedavg"))
    assert [(c.invited_per_round, c.client_steps) for c in (central, local, fedavg)] == [(1, 15), (1, 5), (3, 5)]


def test_a_config_is_frozen_hashable_and_survives_its_mapping() -> None:
    config = RunConfig(algorithm="ferret", lr=1e-3)
    assert RunConfig.from_mapping(config.as_mapping()) == config
    assert hash(RunConfig.from_mapping(config.as_mapping())) == hash(config)
    with pytest.raises(ValueError, match="frozen"):
        config.lr = 2.0
    assert all(isinstance(value, bool | int | float | str) for value in config.as_mapping().values())


@pytest.mark.parametrize(
    ("clients", "fraction", "exactly", "asked"),
    [
        (8, 0.5, 0, 4),
        (100, 0.29, 0, 29),
        (1000, 0.001, 0, 1),
        (738, 0.05, 0, 36),
        (200, 0.05, 0, 10),
        (3, 0.05, 0, 1),
        (20, 0.5, 5, 5),
    ],
)
def test_clients_of_a_round_are_floor_m_n_at_least_one(clients: int, fraction: float, exactly: int, asked: int) -> None:
    config = RunConfig(clients=clients, client_fraction=fraction, clients_per_round=exactly)
    assert config.asked_per_round == asked


def test_variables_and_home_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_HERE", "/data")
    monkeypatch.delenv("FT_MISSING", raising=False)
    assert expand("${FT_HERE}/x") == "/data/x"
    assert expand("${FT_MISSING:-../shared}/x") == "../shared/x"
    assert expand("~/x") == str(Path.home() / "x")
    with pytest.raises(ConfigError, match="environment variable FT_MISSING, which is not set"):
        expand("${FT_MISSING}/x")


def test_local_paths_become_absolute_and_names_stay(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    config = RunConfig(model="base", data="rows.jsonl", out="runs/a").with_absolute_paths(tmp_path)
    assert (config.model, config.data, config.out) == tuple(str(tmp_path / name) for name in ("base", "rows.jsonl", "runs/a"))
    names = RunConfig(model="org/name", data="hub:org/rows").with_absolute_paths(tmp_path)
    assert (names.model, names.data, names.out) == ("org/name", "hub:org/rows", "")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_valid_flat_and_explains_itself(preset: Path) -> None:
    text = preset.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert all(isinstance(value, bool | int | float | str) for value in tomllib.loads(text).values())
    assert RunConfig.load(preset).rounds >= 1


def test_a_preset_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no preset"):
        RunConfig.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("lr = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        RunConfig.load(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        RunConfig.load(tmp_path / "binary.toml")
