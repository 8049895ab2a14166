"""What one setting may be given, before its range is looked at: its type, text that can be stored, numbers that can be sent.

Types are as in TOML and Flower's run config, and are not guessed: a truth value is no number, text is no number, and 1.0 is no
whole number. A whole number stands for itself where a number with a fraction is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import date, time
from fractions import Fraction
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fedtune.errors import ConfigError, UnknownSettingError
from fedtune.foreign import for_screen
from fedtune.methods import Scalar

LONGEST_TEXT = 4096  # characters, as long as a path may be
LONGEST_NAME = 255  # bytes of a file's or folder's name, on every usual file system
PATHS = ("model", "data", "holdout_file", "out", "resume")

_ALIASES = {  # what others call a setting, for the hint in an error
    "learning_rate": "lr",
    "eta": "lr",
    "epsilon": "eps",
    "tau": "local_steps",
    "local_step": "local_steps",
    "m": "client_fraction",
    "fraction_fit": "client_fraction",
    "num_clients": "clients",
    "num_supernodes": "clients",
    "num_rounds": "rounds",
    "num_server_rounds": "rounds",
    "n_accum": "accumulate",
    "slr_max": "server_lr",
    "alpha": "dirichlet_alpha",
    "grad_clip": "clip_norm",
    "model_name": "model",
    "model_name_or_path": "model",
    "dataset": "data",
}
_KINDS: dict[type[Scalar], str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}
_SHOWN = 80  # characters of a value in an error


def kind_of(field: FieldInfo) -> type[Scalar]:
    """bool, int, float or str: what the values of a setting are."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    found = type(choices[0]) if choices else field.annotation
    return next(kind for kind in _KINDS if kind is found)


def checked(values: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> dict[str, Scalar]:
    """`values` in the types of their settings. Raises ConfigError for the first that is of another type or cannot be kept."""
    return {key: _checked(key, value, kind_of(fields[key])) for key, value in values.items()}


def refuse_unknown(values: Mapping[Any, Any], known: Mapping[str, object]) -> None:
    """Raise UnknownSettingError for the first key, in order, that is no setting."""
    unknown = sorted(for_screen(str(key), 80) for key in values if key not in known)
    if unknown:
        alias = _ALIASES.get(unknown[0].lower().replace("-", "_"))
        near = [alias] if alias else difflib.get_close_matches(unknown[0], list(known), n=1, cutoff=0.7)
        hint = f" Did you mean '{near[0]}'?" if near else " `fedtune settings` lists them."
        raise UnknownSettingError(f"There is no setting '{unknown[0]}'.{hint}", key=unknown[0], nearest=near)


def as_written(value: float) -> Fraction:
    """The decimal number that `value` is written as, exactly.

    >>> int(0.29 * 100), int(as_written(0.29) * 100)
    (28, 29)
    """
    return Fraction(repr(float(value)))


def shown(value: object) -> str:
    """`value` as an error shows it: short, on one line, whatever it is."""
    if isinstance(value, str):
        return f"'{for_screen(value, _SHOWN)}'"
    if isinstance(value, bool | float) or (isinstance(value, int) and _fits(value)):
        return repr(value)
    if isinstance(value, int):
        return f"a whole number of {value.bit_length()} bits"
    kinds = {"a table": dict, "a list": list | tuple, "a date": date | time}
    return next((name for name, kind in kinds.items() if isinstance(value, kind)), f"a value of type {type(value).__name__}")


def refused(key: str, value: object, why: str) -> ConfigError:
    """The error for a setting whose value cannot be used."""
    return ConfigError(f"Setting '{key}' = {shown(value)}: {why}.", key=key, value=value)


def _checked(key: str, value: Any, kind: type[Scalar]) -> Scalar:
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | float if kind is float else kind):
        raise refused(key, value, f"{_KINDS[kind]} was expected{_hint(value, kind)}")
    if isinstance(value, str):
        return _text(key, str(value))
    if isinstance(value, int) and not isinstance(value, bool) and not _fits(value):
        raise refused(key, value, "a number of at most 64 bits was expected")
    return float(value) + 0.0 if kind is float else kind(value)  # -0.0 becomes 0.0


def _text(key: str, value: str) -> str:
    if len(value) > LONGEST_TEXT:
        raise refused(key, value, f"at most {LONGEST_TEXT} characters were expected")
    if "\0" in value or not _is_unicode(value):
        raise refused(key, value, "text without NUL and half characters was expected")
    if key in PATHS:
        check_names(value, f"setting '{key}'")
    return value


def check_names(path: str, what: str) -> None:
    """Raise ConfigError for a name in `path` that is longer than a file system takes."""
    if any(len(name.encode()) > LONGEST_NAME for name in path.split("/")):
        raise ConfigError(f"A name in {what} has more than {LONGEST_NAME} bytes: {shown(path)} is no path.", path=path)


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def _hint(value: Any, kind: type) -> str:
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return f" (write {int(value)})"
    if kind is not str and isinstance(value, str):
        return ", without quotes"
    return ""
