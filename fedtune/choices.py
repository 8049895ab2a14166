"""The setting `choices`: where the answers come from of which a held-out sample's right one should be the most likely.

""                   accuracy is not measured
"auto"               the different responses of the sample's category, where they are few (`fedtune.data.choices`)
"column:NAME"        the answers in a column of the held-out rows, row by row
"positive|negative"  these, for every sample whose response is one of them
"""

from __future__ import annotations

from fedtune.errors import ConfigError
from fedtune.foreign import for_screen

AUTO = "auto"
_COLUMN, _BETWEEN = "column:", "|"


def column_of(choices: str) -> str:
    """The column that holds the answers; "" if they come from somewhere else."""
    return choices.removeprefix(_COLUMN).strip() if choices.startswith(_COLUMN) else ""


def listed(text: str) -> tuple[str, ...]:
    """The answers in a text, without the white space around them, none twice.

    >>> listed("positive | negative")
    ('positive', 'negative')
    """
    return tuple(dict.fromkeys(part for one in text.split(_BETWEEN) if (part := one.strip())))


def check_choices(choices: str) -> None:
    """Raise ConfigError for a text that names no source of answers."""
    if choices in ("", AUTO) or column_of(choices) or (not choices.startswith(_COLUMN) and len(listed(choices)) > 1):
        return
    raise ConfigError(
        f"choices = '{for_screen(choices, 80)}' is one answer at most: give two or more with | between them "
        "(positive|negative), auto, column:NAME, or nothing.",
        key="choices",
    )
