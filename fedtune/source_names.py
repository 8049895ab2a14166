"""Names of models and data as people write them: a prefix that says how a source is read, variables, and the home folder."""

from __future__ import annotations

import os
import re

from fedtune.errors import ConfigError
from fedtune.foreign import for_screen
from fedtune.values import check_names

_PREFIX = re.compile(r"([a-z][a-z0-9-]+):(.+)", re.DOTALL)  # two letters at least, so that C:\\ is no prefix


def split_source(source: str) -> tuple[str, str]:
    """The prefix that says how a data source is read, and what stands behind it; "" for a plain file.

    >>> split_source("hub:org/name"), split_source("rows.jsonl"), split_source("natural-instructions:~/ni")
    (('hub', 'org/name'), ('', 'rows.jsonl'), ('natural-instructions', '~/ni'))
    """
    match = _PREFIX.fullmatch(source)
    return (match[1], match[2]) if match else ("", source)


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def expand(text: str) -> str:
    """Expand `${NAME}` and `${NAME:-default}` from the environment, and a leading `~`.

    Raises:
        ConfigError: a variable that is neither set nor has a default, or a name that is too long for a file.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name, default)
        if found is None:
            raise ConfigError(f"'{text}' needs the environment variable {name}, which is not set.", name=name)
        return found

    path = os.path.expanduser(_VARIABLE.sub(value, text))
    check_names(path, f"'{for_screen(text, 80)}'")
    return path
