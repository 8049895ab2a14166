"""Which data sets have a prefix of their own, and reading one by it."""

from __future__ import annotations

from fedtune.config import RunConfig
from fedtune.data.files import read_rows
from fedtune.data.sources import code_alpaca, natural_instructions
from fedtune.data.sources.base import Reader, Rows
from fedtune.errors import DataError
from fedtune.source_names import expand, split_source

NAMED: dict[str, Reader] = {
    "natural-instructions": natural_instructions.train_rows,
    "natural-instructions-test": natural_instructions.test_rows,
    "code-alpaca": code_alpaca.rows,
}


def read_source(source: str, config: RunConfig) -> Rows:
    """The rows of `source`: `PREFIX:PATH` of a named data set, or anything that `read_rows` takes.

    Raises:
        DataError: no such prefix, or a local copy that is missing or not in the form its publisher gives it.
    """
    prefix, place = split_source(expand(source))
    if prefix in NAMED:
        return NAMED[prefix](place, config)
    if prefix not in ("", "hub"):
        raise DataError(
            f"'{source}' begins with '{prefix}:', which names no data set: use {', '.join(f'{name}:' for name in NAMED)} or "
            "hub:, or give a file.",
            prefix=prefix,
            known=tuple(NAMED),
        )
    return list(read_rows(source)), ()
