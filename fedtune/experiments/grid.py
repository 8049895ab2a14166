"""The grid of a sweep: every combination of the values that are tried, as checked settings with a name each."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.config import RunConfig, Scalar
from fedtune.errors import SweepError

REFUSED = {
    "seed": "give --seeds N, which runs every combination with N seeds",
    "rounds": "it is what early stop divides; set it with --set rounds=N",
    "out": "--out names the folder of the sweep",
    "resume": "the same command again carries a sweep on",
    **dict.fromkeys(
        (
            *("data", "instruction_column", "input_column", "output_column", "category_column", "template", "max_length"),
            *("holdout", "holdout_category", "holdout_file", "eval_samples"),
        ),
        "it changes the held-out samples, so losses could not be compared; sweep it by hand",
    ),
}


@dataclass(frozen=True)
class Axis:
    """A setting and the values that are tried."""

    key: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Combination:
    """One point of the grid: the values by key, and the settings with them. `name` is also that of its folder."""

    values: Mapping[str, Scalar]
    settings: RunConfig

    @property
    def name(self) -> str:
        """`lr=3e-05 K=1024`."""
        return " ".join(f"{key}={value}" for key, value in self.values.items())

    @property
    def folder(self) -> str:
        """The name as a file name: `lr_3e-05_K_1024`, and six digits of a digest where characters had to go."""
        plain = re.sub(r"[^\w.+-]", "_", self.name)[:100]
        same = plain == self.name.replace(" ", "_").replace("=", "_")
        return plain if same else f"{plain}_{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"


def grid(base: RunConfig, axes: Sequence[Axis]) -> list[Combination]:
    """Every combination of the values of `axes` over `base`, the last axis changing fastest.

    Raises:
        SweepError: no axis or value, one twice, a setting that cannot be swept, or two combinations that are the same run.
        ConfigError: a combination that cannot be used; names the setting.
    """
    _check(axes)
    found: list[Combination] = []
    for values in itertools.product(*(axis.values for axis in axes)):
        point = dict(zip((axis.key for axis in axes), values, strict=True))
        new = Combination(point, base.replace(**point))
        twin = next((other for other in found if other.settings == new.settings), None)
        if twin is not None:
            raise SweepError(
                f"'{twin.name}' and '{new.name}' are the same run: a value is there twice, or the setting says nothing "
                f"in {base.algorithm}. Leave one of them out."
            )
        found.append(new)
    return found


def _check(axes: Sequence[Axis]) -> None:
    if not axes:
        raise SweepError("Nothing is swept: give --over KEY=VALUE,VALUE,... at least once, for example --over lr=1e-5,1e-4.")
    keys = [axis.key for axis in axes]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise SweepError(f"--over {twice} is given twice: put all its values in one, --over {twice}=VALUE,VALUE.", key=twice)
    for axis in axes:
        if axis.key in REFUSED:
            raise SweepError(f"'{axis.key}' cannot be swept: {REFUSED[axis.key]}.", key=axis.key)
        if not axis.values:
            raise SweepError(f"--over {axis.key} has no values: give {axis.key}=VALUE,VALUE,...", key=axis.key)
