"""CodeAlpaca by programming language: `rosetta_alpaca.json` of github.com/sahil280114/codealpaca, about 8,000 rows.

The file has instruction, input and output, and its input names the language that the answer is to be in. That is the
client's category. Rows in X86-64 Assembly, of which there are few, are left out, which leaves nine languages.

Source: FederatedScope-LLM reads this file so (its data set `rosetta_alpaca`, splitter `meta`, nine clients); Ferret's
paper says only that CodeAlpaca, about 8.0k samples, is divided into nine clients by language.
"""

from __future__ import annotations

from fedtune.config import RunConfig
from fedtune.data.files import Row, read_rows
from fedtune.data.sources.base import Rows, place_and_options
from fedtune.errors import DataError

RARE = "X86-64 Assembly"
MOST_LANGUAGES = 20
"""More different inputs than this are no languages; `code_alpaca_20k.json`, the other file of the repository, has thousands."""


def rows(place: str, config: RunConfig) -> Rows:
    """All rows with their language as category. Raises DataError if the inputs are no languages."""
    path, _ = place_and_options(place, {})
    every = list(read_rows(str(path)))
    languages = sorted({str(row.get("input", "")).strip() for row in every})
    if len(languages) > MOST_LANGUAGES:
        raise DataError(
            f"'{path}' has {len(languages)} different inputs, which are no programming languages: give rosetta_alpaca.json "
            "of CodeAlpaca, or an own file with a column for the language and category_column.",
            inputs=len(languages),
        )
    kept = [_with_language(row) for row in every if str(row.get("input", "")).strip() not in ("", RARE)]
    note = (
        f"data: CodeAlpaca: {len(kept):,} of {len(every):,} rows in {len({row['category'] for row in kept})} languages; "
        f"{len(every) - len(kept):,} in {RARE} or without a language are left out"
    )
    return kept, (note,)


def _with_language(row: Row) -> Row:
    return {**row, "category": str(row["input"]).strip()}
