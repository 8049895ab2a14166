"""`fedtune settings` and docs/settings.md: every setting, once, as the code has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from playback import Outcome

from fedtune.cli.settings import GROUPS, as_markdown, grouped
from fedtune.config import RunConfig

ROOT = Path(__file__).parents[2]


def test_every_setting_is_in_one_group_in_the_order_of_declaration() -> None:
    groups = grouped()
    assert list(groups) == list(GROUPS.values())
    assert [key for keys in groups.values() for key in keys] == list(RunConfig.model_fields)
    assert [keys[0] for keys in groups.values()] == list(GROUPS)


def test_every_setting_has_a_meaning_and_the_table_a_row() -> None:
    text = as_markdown()
    for key, field in RunConfig.model_fields.items():
        assert field.description
        assert text.count(f"| `{key}` |") == 1


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "run: fedtune settings --markdown > docs/settings.md"


def test_one_setting(fedtune: Callable[..., Outcome]) -> None:
    outcome = fedtune("settings", "K")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("K = 1024   (whole number, at least 2, at most 65536)\n")
    assert "algorithm" in fedtune("settings").out
    assert fedtune("settings", "--markdown").out == as_markdown()


def test_a_setting_that_does_not_exist(fedtune: Callable[..., Outcome]) -> None:
    outcome = fedtune("settings", "lokal_steps")
    assert outcome.code == 1
    assert outcome.err == "Error: There is no setting 'lokal_steps'. Did you mean 'local_steps'?\n"
