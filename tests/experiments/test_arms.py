"""What a comparison compares: files with arms, arms of the command line, and the settings that come out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.algorithms import ALGORITHMS
from fedtune.cli.presets import shipped
from fedtune.config import RunConfig
from fedtune.errors import ConfigError, ContradictionError
from fedtune.experiments.arms import LABELS, Comparison, choose, config_of, load, one_rate_for_all

TEXT = """
rounds = 3
lr = 1e-3
pool_every = 1
reconstruction = "shrunken"
[arms.ferret]
lr = 1e-2
[arms.short]
algorithm = "fedkseed"
label = "FedKSeed, 4 bits"
coefficient_bits = 4
"""


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    (tmp_path / "two.toml").write_text(TEXT)
    return load(tmp_path / "two.toml")


def test_arms_of_a_file(comparison: Comparison) -> None:
    arms = choose(comparison, "")
    assert [(arm.name, arm.algorithm, arm.label) for arm in arms] == [
        ("ferret", "ferret", "Ferret"),
        ("short", "fedkseed", "FedKSeed, 4 bits"),
    ]
    ferret, short = (config_of(comparison, arm, {"seed": 7}) for arm in arms)
    assert (ferret.lr, ferret.reconstruction, ferret.rounds, ferret.seed) == (1e-2, "shrunken", 3, 7)
    assert (short.lr, short.coefficient_bits, short.pool_every) == (1e-3, 4, 1)  # reconstruction is not FedKSeed's


def test_arms_of_the_command_line(comparison: Comparison) -> None:
    arms = choose(comparison, "short:K=64, fedavg:lr=0.5:optimizer=adamw,ferret")
    assert [arm.name for arm in arms] == ["short_K-64", "fedavg_lr-0.5_optimizer-adamw", "ferret"]
    assert arms[0].label == "FedKSeed, 4 bits, K = 64"
    config = config_of(comparison, arms[1], {})
    assert (config.algorithm, config.lr, config.optimizer, config.scalar_bits) == ("fedavg", 0.5, "adamw", 32)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("fedsgd", "There is no algorithm 'fedsgd'"),
        ("ferret,ferret", "names an arm twice"),
        ("ferret:lr", "A setting is KEY=VALUE"),
    ],
)
def test_what_cannot_be_compared(comparison: Comparison, wanted: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        choose(comparison, wanted)


def test_arms_with_one_algorithm_are_told_apart(tmp_path: Path) -> None:
    """Tables and figures group by label: two arms with one label would be drawn as one."""
    path = tmp_path / "rates.toml"
    path.write_text("[arms.ferret]\n[arms.fast]\nalgorithm = 'ferret'\n")
    assert [arm.label for arm in choose(load(path), "")] == ["Ferret", "Ferret (fast)"]
    path.write_text("[arms.ferret]\n[arms.fast]\nalgorithm = 'ferret'\nlabel = 'Ferret'\n")
    with pytest.raises(ConfigError, match="'ferret' and 'fast' have the same label"):
        choose(load(path), "")
    with pytest.raises(ConfigError, match="'ferret' and 'fast' have the same label"):
        choose(load(path), "ferret,fast")
    assert [arm.name for arm in choose(load(path), "fast")] == ["fast"]


def test_an_arm_with_a_setting_of_another_algorithm_is_named(comparison: Comparison) -> None:
    for setting, text in (("eps=0.1", "eps belongs to"), ("K=64", "K = 64 says nothing in fedavg")):
        (arm,) = choose(comparison, f"fedavg:{setting}")
        with pytest.raises(ContradictionError, match=rf"^Arm 'fedavg_{setting.replace('=', '-')}': {text}"):
            config_of(comparison, arm, {})


def test_a_preset_has_no_arms_and_a_comparison_is_no_preset(tmp_path: Path) -> None:
    (tmp_path / "plain.toml").write_text("rounds = 3\n")
    with pytest.raises(ConfigError, match="Say what to compare"):
        choose(load(tmp_path / "plain.toml"), "")
    (tmp_path / "two.toml").write_text(TEXT)
    with pytest.raises(ConfigError, match="compares several algorithms: run it with `fedtune compare"):
        RunConfig.load(tmp_path / "two.toml")
    (tmp_path / "bad.toml").write_text("arms = 3\n")
    with pytest.raises(ConfigError, match="arms are tables"):
        load(tmp_path / "bad.toml")


def test_one_learning_rate_for_both_kinds_is_noticed(comparison: Comparison) -> None:
    shared = {"lr": 1e-3}
    assert one_rate_for_all(choose(comparison, "fedkseed,fedavg"), shared)
    assert not one_rate_for_all(choose(comparison, "fedkseed,fedavg:lr=1e-2"), shared)
    assert not one_rate_for_all(choose(comparison, "fedkseed,decomfl"), shared)
    assert not one_rate_for_all(choose(comparison, "fedkseed,fedavg"), {}), "each has the rate of its method"


@pytest.mark.parametrize("name", [preset.name for preset in shipped() if preset.name.startswith("comparisons/")])
def test_the_comparisons_that_ship_are_valid(name: str) -> None:
    comparison = load(next(preset.path for preset in shipped() if preset.name == name))
    configs = [config_of(comparison, arm, {}) for arm in choose(comparison, "")]
    samples = {config.local_steps * config.batch_size * config.accumulate for config in configs}
    assert len(samples) == 1, "equal numbers of local samples"
    assert len({(config.rounds, config.clients, config.asked_per_round, config.partition) for config in configs}) == 1


def test_every_algorithm_has_a_label() -> None:
    assert LABELS.keys() == ALGORITHMS.keys()
