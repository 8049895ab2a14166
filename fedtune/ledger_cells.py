"""The cells of a ledger as typed values: whoever made the file, what is above this line sees only what a cell may hold.

A file with right digests can still hold anything: text where bytes belong, numbers without end, JSON of another shape or
nested a hundred thousand times. A cell that is not what docs/ledger.md says is refused by its table, row and column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fedtune.bounded import BadJsonError, parse_json
from fedtune.config import RunConfig
from fedtune.errors import ConfigError, DamagedLedgerError, ForeignLedgerError, UnknownSettingError
from fedtune.foreign import for_screen
from fedtune.traffic import Traffic

MOST_TEXT = 1 << 26  # bytes of a text
MOST_ROUNDS = 1_000_000  # as in the settings
LONGEST_NAME = 4096  # characters of a name or an id
LARGEST_COUNT = 2**53  # of bytes, messages, events: exact as a float too
MOST_DIMENSIONS = 16
MOST_PARAMETERS = 2**40  # of a model
T = TypeVar("T")


class Undecodable(bytes):
    """A text of the file that is not UTF-8; no cell may hold one."""


def text_of(raw: bytes) -> str | Undecodable:
    """What SQLite is to make of a text (`Connection.text_factory`)."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return Undecodable(raw)


@dataclass(frozen=True)
class Cells:
    """One row of `table`, its values by the names of their columns. `row` is what an error calls it ("round 3").

    Every method raises DamagedLedgerError, naming the column, if the cell is not what it is asked for.
    """

    path: Path
    table: str
    row: str
    values: Mapping[str, object]

    def whole(self, column: str, least: int = 0, most: int = LARGEST_COUNT) -> int:
        """A whole number of `least` to `most`."""
        value = self.values[column]
        if not isinstance(value, int) or not least <= value <= most:
            self._bad(column, f"is no whole number of {least} to {most}")
        return value

    def real(self, column: str) -> float:
        """A finite number."""
        value = self.values[column]
        if not isinstance(value, float) or not math.isfinite(value):
            self._bad(column, "is no finite number")
        return value

    def real_or_none(self, column: str) -> float | None:
        """A finite number or nothing."""
        return None if self.values[column] is None else self.real(column)

    def text(self, column: str, most: int = LONGEST_NAME) -> str:
        """A text of at most `most` characters."""
        value = self.values[column]
        if not isinstance(value, str):
            self._bad(column, "is no text in UTF-8")
        if len(value) > most:
            self._bad(column, f"has {len(value):,} characters, more than {most:,}")
        return value

    def blob(self, column: str, length: int | None = None) -> bytes:
        """Bytes, so many if `length` is given."""
        value = self.values[column]
        if not isinstance(value, bytes) or isinstance(value, Undecodable):
            self._bad(column, "is no bytes")
        if length is not None and len(value) != length:
            self._bad(column, f"has {len(value)} bytes, not {length}")
        return value

    def mapping(self, column: str) -> dict[str, Any]:
        """A JSON object."""
        return _object(self._json(column), self._refusing(column))

    def names(self, column: str) -> tuple[str, ...]:
        """A JSON list of texts."""
        return _names(self._json(column), self._refusing(column))

    def texts(self, column: str) -> dict[str, str]:
        """A JSON object of texts."""
        return _each(self._json(column), _name, self._refusing(column))

    def numbers(self, column: str) -> dict[str, float]:
        """A JSON object of finite numbers."""
        return _each(self._json(column), _number, self._refusing(column))

    def traffic(self, column: str) -> dict[str, Traffic]:
        """A JSON object of six counts each."""
        return _each(self._json(column), _traffic, self._refusing(column))

    def shapes(self, column: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the trainable tensors of a model: one at least, MOST_PARAMETERS elements at most in all."""
        refuse = self._refusing(column)
        found = tuple(_shape(one, refuse) for one in _list(self._json(column), refuse))
        if not found or sum(math.prod(shape) for _, shape in found) > MOST_PARAMETERS:
            refuse(f"has no tensor, or more than {MOST_PARAMETERS} parameters")
        return found

    def detail(self, column: str, kind: str) -> dict[str, Any]:
        """What an event of `kind` says: the fields that are read, in their form, and whatever else is there."""
        refuse = self._refusing(column)
        found = _object(self._json(column), refuse)
        for key, (check, needed) in _DETAILS.get(kind, {}).items():
            if needed and key not in found:
                refuse(f"of an event '{kind}' has no {key}")
            if key in found:
                check(found[key], refuse)
        return found

    def _json(self, column: str) -> Any:
        try:
            return parse_json(self.text(column, MOST_TEXT))
        except BadJsonError as error:
            self._bad(column, f"is not JSON as a ledger has it ({error})")

    def _refusing(self, column: str) -> Refuse:
        return lambda why: self._bad(column, why)

    def _bad(self, column: str, why: str) -> NoReturn:
        raise DamagedLedgerError(
            f"'{self.path}' is damaged: column {column} of {for_screen(self.row, 40)} (table {self.table}) {why}. "
            "Restore it from a copy.",
            row=self.row,
            table=self.table,
            column=column,
        )


def settings_in(used: Mapping[str, Any], where: str) -> RunConfig:
    """The settings that a ledger has `where` ("the header").

    Raises:
        ForeignLedgerError: a setting that this program does not know. DamagedLedgerError: a value that no run can have.
    """
    try:
        return RunConfig.from_mapping(used)
    except UnknownSettingError as error:
        raise ForeignLedgerError(
            f"The run has a setting that this program does not know ({error}): use the fedtune that made it."
        ) from None
    except ConfigError as error:
        raise DamagedLedgerError(
            f"No run can have the settings in {where} of the ledger ({error}) Restore it.", row=where
        ) from None


# ---------------------------------------------------------------------- the forms of JSON in a ledger

Refuse = Callable[[str], NoReturn]
Check = Callable[[Any, Refuse], object]


def _object(value: Any, refuse: Refuse) -> dict[str, Any]:
    return value if isinstance(value, dict) else refuse("holds no JSON object where one belongs")


def _list(value: Any, refuse: Refuse) -> Sequence[Any]:
    return value if isinstance(value, list) else refuse("holds no JSON list where one belongs")


def _each(value: Any, check: Callable[[Any, Refuse], T], refuse: Refuse) -> dict[str, T]:
    return {_name(key, refuse): check(item, refuse) for key, item in _object(value, refuse).items()}


def _name(value: Any, refuse: Refuse) -> str:
    return value if isinstance(value, str) and len(value) <= MOST_TEXT else refuse("holds something else where a text belongs")


def _names(value: Any, refuse: Refuse) -> tuple[str, ...]:
    return tuple(_name(item, refuse) for item in _list(value, refuse))


def _number(value: Any, refuse: Refuse) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        refuse("holds something else where a number belongs")
    return value


def _number_or_none(value: Any, refuse: Refuse) -> float | None:
    return None if value is None else _number(value, refuse)


def _count(value: Any, refuse: Refuse) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_COUNT:
        refuse("holds something else where a count belongs")
    return value


def _traffic(value: Any, refuse: Refuse) -> Traffic:
    counts = _list(value, refuse)
    return (
        Traffic(*(_count(item, refuse) for item in counts)) if len(counts) == 6 else refuse("holds no six counts of a client")
    )


def _shape(value: Any, refuse: Refuse) -> tuple[str, tuple[int, ...]]:
    pair = _list(value, refuse)
    if len(pair) != 2 or len(_list(pair[1], refuse)) > MOST_DIMENSIONS or len(_name(pair[0], refuse)) > LONGEST_NAME:
        refuse("holds no name and shape where they belong")
    lengths = tuple(_count(item, refuse) for item in pair[1])
    return pair[0], lengths


def _category(value: Any, refuse: Refuse) -> None:
    """The scores of one category of an evaluation."""
    found = _object(value, refuse)
    _count(found.get("samples"), refuse)
    for key in ("eval_loss", "accuracy"):
        _number_or_none(found.get(key), refuse)


def _scalars(value: Any, refuse: Refuse) -> None:
    for item in _object(value, refuse).values():
        if not isinstance(item, str | int | float):
            refuse("holds something else where a setting belongs")


_ROUND, _TEXTS, _SECONDS = (_count, True), (lambda v, r: _each(v, _name, r)), (lambda v, r: _each(v, _number, r))
_SCORES = ("eval_loss_sample_mean", "perplexity", "accuracy", "rouge_l", "rouge_l_papers", "exact_match")
_DETAILS: dict[str, dict[str, tuple[Check, bool]]] = {  # by kind of event: key, its form, and whether it must be there
    "evaluation": {
        "round": _ROUND,
        "eval_loss": (_number_or_none, True),
        **{name: (_number_or_none, False) for name in _SCORES},
        "questions": (_count, False),
        "categories": (lambda v, r: _each(v, _category, r), False),
        "seconds": (_SECONDS, False),
        "cpu_seconds": (_SECONDS, False),
    },
    "attempt": {
        "round": _ROUND,
        "clients": (_names, True),
        "refused": (_TEXTS, True),
        "seconds": (_SECONDS, True),
        "traffic": (lambda v, r: _each(v, _traffic, r), True),
    },
    "resume": {"settings": (_scalars, True), "versions": (_TEXTS, True)},
    "command": {"name": (_name, True), "command": (_name, False), "client": (_name, False), "refused": (_name, False)},
    "drop": {"client": (_name, True)},
    "keys": {"keys": (_TEXTS, True)},
}
