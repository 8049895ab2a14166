"""How numbers are written."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.cli.numbers import in_about, in_bytes, in_loss, in_ratio, in_time

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (812, "812 B"), (999.96, "1.00 kB"), (1210, "1.21 kB"), (47_300_000, "47.3 MB"), (123_456, "123 kB")],
)
def test_bytes(count: float, text: str) -> None:
    assert in_bytes(count) == text


@given(st.floats(min_value=0, max_value=1e15))
def test_bytes_keep_three_digits(count: float) -> None:
    value, unit = in_bytes(count).split()
    assert float(value) * UNITS[unit] == pytest.approx(count, rel=0.006, abs=0.5)
    assert float(value) < 1000 or unit == "TB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.344, "0.34 s"), (9.996, "10.0 s"), (12.1, "12.1 s"), (59.96, "1 min 00 s"), (250, "4 min 10 s"), (7500, "2 h 05 min")],
)
def test_time(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


def test_a_time_that_is_only_estimated() -> None:
    assert [in_about(0.2), in_about(7.87), in_about(89.4), in_about(150), in_about(7500)] == [
        "0 s",
        "8 s",
        "89 s",
        "2 min",
        "2 h 05 min",
    ]


def test_loss_and_ratio() -> None:
    assert [in_loss(None), in_loss(2.0), in_loss(math.nan), in_loss(math.inf)] == ["-", "2.0000", "not finite", "not finite"]
    assert [in_ratio(3.24), in_ratio(9.96), in_ratio(48.4), in_ratio(12345)] == ["3.2x", "10x", "48x", "12,300x"]
