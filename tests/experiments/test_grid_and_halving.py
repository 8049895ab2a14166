"""Which runs a sweep has, and which it carries on: pure functions."""

from __future__ import annotations

import math

import pytest

from fedtune.config import RunConfig
from fedtune.errors import ContradictionError, SweepError, UnknownSettingError
from fedtune.experiments.grid import Axis, grid
from fedtune.experiments.halving import rungs, survivors, why_no_early_stop

BASE = RunConfig(rounds=8)


def test_every_combination_once_the_last_axis_fastest() -> None:
    found = grid(BASE, [Axis("lr", (1e-5, 1e-4)), Axis("K", (64, 128, 256))])
    assert [(one.settings.lr, one.settings.K) for one in found] == [(r, k) for r in (1e-5, 1e-4) for k in (64, 128, 256)]
    assert found[1].name == "lr=1e-05 K=128"
    assert found[1].folder == "lr_1e-05_K_128"


def test_folders_of_values_with_odd_characters_differ() -> None:
    found = grid(BASE, [Axis("model", ("a/b", "a:b", "a_b"))])
    assert len({one.folder for one in found}) == 3
    assert all("/" not in one.folder for one in found)


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ([], "Nothing is swept"),
        ([Axis("lr", ())], "has no values"),
        ([Axis("lr", (1e-5,)), Axis("lr", (1e-4,))], "given twice"),
        ([Axis("lr", (1e-5, 0.00001))], "are the same run"),
        ([Axis("rounds", (2, 4))], "early stop divides"),
        ([Axis("seed", (1, 2))], "--seeds N"),
        ([Axis("holdout", (0.1, 0.2))], "could not be compared"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_the_fix(axes: list[Axis], says: str) -> None:
    with pytest.raises(SweepError, match=says):
        grid(BASE, axes)


def test_a_setting_that_says_nothing_in_the_algorithm_is_refused() -> None:
    with pytest.raises(ContradictionError, match="K = 64 says nothing in fedavg"):
        grid(RunConfig(algorithm="fedavg"), [Axis("K", (64, 128))])
    with pytest.raises(SweepError, match="are the same run: a value is there twice, or the setting says nothing"):
        grid(BASE, [Axis("lr", (1, 1.0))])


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UnknownSettingError, match="Did you mean 'lr'"):
        grid(BASE, [Axis("learning_rate", (1e-5,))])


@pytest.mark.parametrize(
    ("rounds", "count", "keep", "expected"),
    [
        (16, 3, 0.5, (4, 8, 16)),
        (10, 3, 0.5, (3, 5, 10)),
        (1, 3, 0.5, (1,)),
        (3, 3, 0.5, (1, 2, 3)),
        (16, 1, 0.5, (16,)),
        (16, 3, 1.0, (16,)),
        (100, 3, 0.1, (1, 10, 100)),
    ],
)
def test_rungs_rise_to_all_rounds(rounds: int, count: int, keep: float, expected: tuple[int, ...]) -> None:
    assert rungs(rounds, count, keep) == expected


@pytest.mark.parametrize(("count", "keep"), [(0, 0.5), (3, 0.0), (3, 1.5), (3, math.nan)])
def test_rungs_that_make_no_sense_are_refused(count: int, keep: float) -> None:
    with pytest.raises(SweepError, match="--rungs of at least 1"):
        rungs(16, count, keep)


def test_the_best_share_survives_and_what_diverged_never_does() -> None:
    losses = {"a": 2.0, "b": math.nan, "c": 1.0, "d": 3.0, "e": math.inf}
    assert survivors(losses, 0.5) == ("c", "a", "d")
    assert survivors(losses, 0.2) == ("c",)
    assert survivors(losses, 1.0) == ("c", "a", "d")
    assert survivors({"a": math.nan}, 0.5) == ()
    assert survivors({"a": 1.0, "b": 1.0}, 0.5) == ("a",)


def test_a_schedule_over_the_rounds_is_not_stopped_early() -> None:
    assert why_no_early_stop(BASE) == ""
    assert "anneal = cosine" in why_no_early_stop(RunConfig(algorithm="ferret", anneal="cosine"))
