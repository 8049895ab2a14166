"""The files server.env and node.env: NAME='value' lines that the shell scripts source and `fedtune deploy check` reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedtune.errors import DeployError

SERVER_ENV, NODE_ENV = "server.env", "node.env"

_LINE = re.compile(r"([A-Z_][A-Z0-9_]*)=(.*)")

Entry = tuple[str, str, str]
"""Name, value, and what it is, which stands above it."""


def as_text(title: str, entries: Sequence[Entry]) -> str:
    """The file: a comment and NAME='value' for each entry, quoted for the shell."""
    lines = [f"# {title}", "# The shell reads this file: keep the single quotes, and no space around =."]
    for name, value, meaning in entries:
        lines += ["", f"# {meaning}", f"{name}='{_unquoted(name, value)}'"]
    return "\n".join(lines) + "\n"


def read(path: Path) -> Mapping[str, str]:
    """The values of a file that `as_text` wrote and somebody may have edited.

    Raises:
        DeployError: it is missing, or a line is not NAME='value'.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DeployError(f"'{path}' cannot be read ({error.strerror or error}): is this a folder of a deployment?") from None
    return dict(_entry(path, number, line) for number, line in enumerate(text.splitlines(), 1) if _says_something(line))


def _says_something(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _entry(path: Path, number: int, line: str) -> tuple[str, str]:
    found = _LINE.fullmatch(line.strip())
    try:
        words = shlex.split(found[2], comments=True) if found else []
    except ValueError:
        words, found = [], None
    if found is None or len(words) > 1:
        raise DeployError(f"Line {number} of '{path}' is not NAME='value': put the value between single quotes.", line=number)
    return found[1], words[0] if words else ""


def _unquoted(name: str, value: str) -> str:
    """`value`, refused if single quotes or Flower's double quotes could not hold it."""
    if any(mark in value for mark in "'\"\\\0") or value.splitlines() not in ([], [value]):
        raise DeployError(f"{name} = {value!r} has a quote, a backslash or a line break: rename it.")
    return value
