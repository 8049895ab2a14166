"""Presets and `--set`: every shipped preset is valid, names and files are found, values follow TOML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from playback import Outcome

from fedtune.cli.presets import choose, parse_setting, shipped
from fedtune.config import RunConfig
from fedtune.errors import ConfigError, UnknownSettingError


@pytest.mark.parametrize("name", [preset.name for preset in shipped() if not preset.name.startswith("comparisons/")])
def test_every_shipped_preset_is_valid_and_says_what_it_is(name: str) -> None:
    preset = {found.name: found for found in shipped()}[name]
    assert preset.title
    assert choose(name).config == RunConfig.load(preset.path)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("lr=1e-5", ("lr", 1e-5)),
        ("rounds = 3", ("rounds", 3)),
        ("trust_remote_code=true", ("trust_remote_code", True)),
        ("model=foo", ("model", "foo")),
        ("model=./a=b", ("model", "./a=b")),
        ("model='7'", ("model", "7")),
        ("revision=2024-01-01", ("revision", "2024-01-01")),
        ("data=[1]", ("data", "[1]")),
        ("holdout_category=", ("holdout_category", "")),
        ("model=x\nrounds=3", ("model", "x\nrounds=3")),
    ],
)
def test_values_follow_toml_and_fall_back_to_text(text: str, parsed: tuple[str, object]) -> None:
    assert parse_setting(text) == parsed


@pytest.mark.parametrize("text", ["rounds", "=3", ""])
def test_a_setting_without_a_key_or_a_value_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"--set takes KEY=VALUE, not '{text}'"):
        parse_setting(text)


def test_settings_are_applied_in_order_and_checked(preset: Path) -> None:
    chosen = choose(str(preset), ["rounds=3", "lr=1e-3", "rounds=5"])
    assert (chosen.label, chosen.config.rounds, chosen.config.lr, chosen.config.clients) == ("small", 5, 1e-3, 4)
    with pytest.raises(UnknownSettingError, match=r"There is no setting 'round'\. Did you mean 'rounds'\?"):
        choose(str(preset), ["round=3"])
    with pytest.raises(ConfigError, match="Setting 'rounds' = 'many'"):
        choose(str(preset), ["rounds=many"])


def test_what_is_not_there_is_named_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shipped()[0].name
    with pytest.raises(ConfigError, match=f"There is no preset '{first}x'. Did you mean '{first}'"):
        choose(first + "x")
    with pytest.raises(ConfigError, match=r"There is no preset file 'runs/none\.toml': give an existing TOML file"):
        choose("runs/none.toml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / first).write_text("rounds = 7")
    assert choose(first).config.rounds == 7  # a file in the working directory comes first


def test_presets_lists_all(fedtune: Callable[..., Outcome]) -> None:
    outcome = fedtune("presets")
    assert outcome.code == 0
    for preset in shipped():
        assert preset.name in outcome.out
        assert preset.title in outcome.out
