"""A view of some settings, for what outlives the run that asked for it: reading another setting is an error, and loud.

What stays loaded is found again by the settings that it names. If it could read a setting that it does not name, a second
run with another value of it would get what the first one asked for, and nobody would see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from fedtune.config import RunConfig


class UndeclaredSettingError(RuntimeError):
    """A fault of the program, not of its settings: what stays loaded read a setting that it does not name."""


class _View:
    """Stands for a RunConfig and has some of its settings; its properties work as long as they read only these."""

    def __init__(self, config: RunConfig, names: Sequence[str], holder: str) -> None:
        self._values = {name: getattr(config, name) for name in names}
        self._holder = holder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._values:
            return self._values[name]
        derived = getattr(RunConfig, name, None)
        if isinstance(derived, property) and derived.fget is not None and name not in ("model_extra", "model_fields_set"):
            return derived.fget(self)
        raise UndeclaredSettingError(
            f"'{name}' was read by {self._holder}, which stays loaded for runs with another value of it: add it to the "
            "settings that it names, or hand the value in with each call."
        )


def only(config: RunConfig, names: Sequence[str], holder: str) -> RunConfig:
    """The settings `names` of `config`, and no others.

    Args:
        holder: what keeps the view, for the error.

    Returns:
        What can be handed to whoever takes a RunConfig and reads these settings. Anything else, methods included, raises
        UndeclaredSettingError.
    """
    return cast(RunConfig, _View(config, names, holder))
