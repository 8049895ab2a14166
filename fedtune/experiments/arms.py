"""What a comparison compares: arms, each an algorithm with settings of its own on top of what all have in common.

A comparison is a preset, or a preset with tables:

    rounds = 8                     # for all
    [arms.fedavg]                  # "fedavg" is the arm's name, and its algorithm unless it says otherwise
    lr = 1e-2
    [arms.short]
    algorithm = "fedkseed"
    label = "FedKSeed, 4 bits"     # what tables and figures call it; "FedKSeed (short)" without this line
    coefficient_bits = 4

On the command line an arm is NAME or NAME:key=value:key=value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune import toml
from fedtune.config import RunConfig, Scalar, read_setting
from fedtune.errors import ConfigError
from fedtune.methods import FIRST_ORDER, FIXED, OWNERS, ZEROTH_ORDER

LABELS = {
    "fedkseed": "FedKSeed",
    "fedkseed-pro": "FedKSeed-Pro",
    "ferret": "Ferret",
    "subspace": "subspace",
    "fedavg": "FedAvg",
    "lora": "LoRA averaging",
    "fedzo": "FedZO",
    "decomfl": "DeComFL",
    "local": "local only",
    "central": "centralised",
}


@dataclass(frozen=True)
class Arm:
    """One line of a comparison: `settings` are its own, `label` is for people."""

    name: str
    algorithm: str
    label: str
    settings: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A comparison file: what all arms have in common, and the arms that it names, in order."""

    name: str
    common: Mapping[str, Scalar]
    arms: tuple[Arm, ...]


def load(path: Path) -> Comparison:
    """Read a comparison, or a preset, which has no arms.

    Raises:
        ConfigError: it cannot be read, is not TOML, or an arm is not a table.
    """
    values = toml.read(path, "comparison")
    tables = values.pop("arms", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError(f"'{path}': arms are tables, [arms.NAME], with settings in them.", path=str(path))
    return Comparison(path.stem, values, tuple(_arm(name, table) for name, table in tables.items()))


def choose(comparison: Comparison, wanted: str) -> tuple[Arm, ...]:
    """The arms that `wanted` names, with commas between; "" for all of the file.

    Raises:
        ConfigError: an arm that is neither in the file nor an algorithm, the same one or the same label twice, or no arm.
    """
    if not wanted:
        if not comparison.arms:
            raise ConfigError("Say what to compare: --algorithms fedkseed,ferret,fedavg, or tables [arms.NAME] in the file.")
        _each_has_a_label_of_its_own(comparison.arms)
        return comparison.arms
    known = {arm.name: arm for arm in comparison.arms}
    arms = tuple(_named(text.strip(), known) for text in wanted.split(","))
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ConfigError(f"--algorithms names an arm twice: {', '.join(names)}.")
    _each_has_a_label_of_its_own(arms)
    return arms


def config_of(comparison: Comparison, arm: Arm, overrides: Mapping[str, Scalar]) -> RunConfig:
    """The settings of an arm: common ones that its algorithm has, `overrides` of all arms, then its own.

    Raises:
        ConfigError: or one of its subclasses, naming the arm.
    """
    shared = {**comparison.common, **overrides}
    foreign = {key for key, owners in OWNERS.items() if arm.algorithm not in owners} | FIXED.get(arm.algorithm, {}).keys()
    fitting = {key: value for key, value in shared.items() if key not in foreign}
    try:
        return RunConfig.from_mapping({**fitting, "algorithm": arm.algorithm, **arm.settings})
    except ConfigError as error:
        raise type(error)(f"Arm '{arm.name}': {error}", **error.facts) from None


def one_rate_for_all(arms: Sequence[Arm], shared: Mapping[str, Scalar]) -> bool:
    """Whether methods with and without gradients would run at the one `lr` of `shared`, which suits one of them at most."""
    if not shared.get("lr"):
        return False  # each has the default of its own
    plain = [arm.algorithm for arm in arms if "lr" not in arm.settings]
    return any(name in FIRST_ORDER for name in plain) and any(name in ZEROTH_ORDER for name in plain)


def _each_has_a_label_of_its_own(arms: Sequence[Arm]) -> None:
    """Tables and figures tell arms apart by their labels only."""
    for place, arm in enumerate(arms):
        for other in arms[:place]:
            if other.label == arm.label:
                raise ConfigError(
                    f"Arms '{other.name}' and '{arm.name}' have the same label, '{arm.label}': change one.", arm=arm.name
                )


def _named(text: str, known: Mapping[str, Arm]) -> Arm:
    """An arm of the command line: "fedavg", or "fedkseed:K=4096:lr=1e-5"."""
    name, *settings = text.split(":")
    own = dict(read_setting(setting) for setting in settings)
    base = known.get(name) or _arm(name, {})
    if not own:
        return base
    extra = ", ".join(f"{key} = {value}" for key, value in own.items())
    return Arm(text.replace(":", "_").replace("=", "-"), base.algorithm, f"{base.label}, {extra}", {**base.settings, **own})


def _arm(name: str, table: Mapping[str, Any]) -> Arm:
    settings = dict(table)
    algorithm = str(settings.pop("algorithm", name))
    if algorithm not in LABELS:
        raise ConfigError(f"There is no algorithm '{algorithm}' for arm '{name}': {', '.join(LABELS)}.", arm=name)
    usual = LABELS[algorithm] if name == algorithm else f"{LABELS[algorithm]} ({name})"
    return Arm(name, algorithm, str(settings.pop("label", usual)), settings)
