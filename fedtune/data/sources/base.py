"""What a named data set is: a reader from a local copy to rows, and the notation `PATH?option=value&option=value`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fedtune.config import RunConfig
from fedtune.data.files import Row
from fedtune.errors import DataError
from fedtune.source_names import expand

Rows = tuple[list[Row], tuple[str, ...]]
"""The rows (columns instruction, input, output, category) and one-line notes on what was left out and why."""

Reader = Callable[[str, RunConfig], Rows]
"""From what stands behind the prefix, and the run (whose seed names the draws), to the rows."""


def place_and_options(place: str, defaults: Mapping[str, float]) -> tuple[Path, dict[str, float]]:
    """The path (variables expanded) and the numbers of `PATH?option=value&...`; options that are not given have `defaults`.

    Raises:
        DataError: an option that does not exist or is no number at least 0.
    """
    path, _, query = place.partition("?")
    options = dict(defaults)
    for text in query.split("&") if query else ():
        name, _, value = text.partition("=")
        if name not in defaults:
            raise DataError(f"'{place}': there is no option '{name}', only {', '.join(defaults)}.", option=name)
        try:
            options[name] = float(value)
        except ValueError:
            options[name] = -1.0
        if not 0 <= options[name] < float("inf"):
            raise DataError(f"'{place}': option '{name}' must be a number, at least 0, not '{value}'.", option=name)
    return Path(expand(path)), options
