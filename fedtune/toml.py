"""TOML in and out: a file of settings is read within limits, and a scalar is written so that it reads back the same."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError
from fedtune.foreign import for_screen
from fedtune.regular import read_regular

MOST_BYTES = 64 << 10
"""Of a file of settings: those that ship have 2 KiB, and reading takes time that grows with the square of nested names."""


def read(path: Path, kind: str) -> dict[str, Any]:
    """The contents of a TOML file; a byte order mark before them is skipped.

    Args:
        kind: what the file is, for errors ("preset").

    Raises:
        ConfigError: it is not there, no regular file, larger than MOST_BYTES, not UTF-8 or not TOML.
    """
    shown = for_screen(str(path), 200)
    name = f"{kind.capitalize()} '{shown}'"
    try:
        data = read_regular(path, MOST_BYTES)
    except FileNotFoundError:
        raise ConfigError(
            f"There is no {kind} '{shown}'. Give a TOML file or a name from `fedtune presets`.", path=str(path)
        ) from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}. Give a TOML file.", path=str(path)) from None
    try:
        return parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} cannot be read: it is not UTF-8 (byte {error.start}).", path=str(path)) from None
    except ValueError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}.", path=str(path)) from None


def parse(text: str) -> dict[str, Any]:
    """`text` as TOML. Raises ValueError for whatever is wrong with it: no TOML, too deep, or a number of too many digits."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def written(value: bool | int | float | str) -> str:
    """A scalar as TOML. JSON's spelling of text, bool and int is TOML's, but for U+007F; repr's of a finite float is too."""
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def comment(text: str) -> str:
    """`text` as one line of comment: a line break in it would begin a setting."""
    return "# " + "".join(character if character.isprintable() else " " for character in text)
