"""Logarithm, exponential and cosine of our own: the same bits for ever (known answers), and close to the exact values."""

from __future__ import annotations

import ast
import hashlib
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import elementary
from fedtune.config import RunConfig
from fedtune.data.partition import partition
from fedtune.seeds import Stream

PI = Fraction(314159265358979323846264338327950288419716939937510582097494459, 10**62)


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).astype("<f8").tobytes()).hexdigest()[:16]


def test_known_answers() -> None:
    """What a machine with another C library, another numpy or another CPU has to give too, bit by bit."""
    u = 1.0 - Stream("elementary").uniform(10_000)
    assert digest(elementary.log(u)) == "1ae304c1ff3b6000"
    assert digest(elementary.exp(elementary.log(u) * 37.0)) == "e4aa687a8bee2adb"
    assert digest(elementary.cosine_of_turns(u)) == "e7cbdd98b287c47b"
    assert digest(Stream("known").normal(1000)) == "ecd078ec733f00e8"
    assert digest(Stream("known").gamma(0.3, 1000)) == "b75ca741c422d20f"
    assert digest(Stream("known").dirichlet(0.5, 1000)) == "502feb5f7616caf3"


@pytest.mark.parametrize(
    ("kind", "alpha", "known"),
    [("dirichlet", 0.5, "14dd227dde904406"), ("dirichlet", 0.05, "2d87742a96346ece"), ("quantity", 0.5, "d9c87c5d6b3a793c")],
)
def test_partitions_are_those_of_recorded_runs(kind: str, alpha: float, known: str) -> None:
    """Rows as they were when the draws still went through the C library."""
    rows = {row: "abcdefgh"[(row * 7 + row // 3) % 8] for row in range(1500)}
    config = RunConfig(partition=kind, dirichlet_alpha=alpha, clients=8, min_samples=1, seed=3)
    assert hashlib.sha256(repr(partition(rows, config)).encode()).hexdigest()[:16] == known


@given(st.floats(5e-324, 1e308))
@settings(max_examples=300)
def test_the_logarithm_is_within_a_unit_in_the_last_place(x: float) -> None:
    assert_close(float(elementary.log(np.array([x]))[0]), Decimal(x).ln)


@given(st.floats(-744.0, 709.0))
@settings(max_examples=300)
def test_the_exponential_is_within_a_unit_in_the_last_place(x: float) -> None:
    assert_close(float(elementary.exp(np.array([x]))[0]), Decimal(x).exp)


@given(st.floats(-1e6, 1e6))
@settings(max_examples=300)
def test_the_cosine_is_close_and_exact_at_quarters(turns: float) -> None:
    rest = Fraction(turns) - Fraction(round(4 * Fraction(turns)), 4)
    inside = float(2 * PI * rest)
    exact = (math.cos(inside), -math.sin(inside), -math.cos(inside), math.sin(inside))[round(4 * Fraction(turns)) % 4]
    assert float(elementary.cosine_of_turns(np.array([turns]))[0]) == pytest.approx(exact, rel=0, abs=2.0**-52)


def test_edges() -> None:
    assert elementary.cosine_of_turns(np.array([0.0, 0.25, 0.5, 0.75, 1.0, 2.0**50])).tolist() == [1, 0, -1, 0, 1, 1]
    assert elementary.log(np.array([1.0])).tolist() == [0.0]
    assert elementary.exp(np.array([0.0, -1e308, -math.inf])).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-6, 1_000_000.0])
def test_extreme_concentrations_are_divided_too(alpha: float) -> None:
    shares = Stream("edge").dirichlet(alpha, 50)
    assert math.fsum(shares.tolist()) == pytest.approx(1.0)
    assert (shares >= 0.0).all()


@pytest.mark.parametrize(
    "name", ["fedtune/seeds.py", "fedtune/data/partition.py", "fedtune/elementary.py", "fedtune/coefficients.py"]
)
def test_what_both_sides_derive_calls_nothing_of_the_c_library_that_is_not_exact(name: str) -> None:
    exact = {"math": {"fsum", "sqrt", "pi", "inf", "frexp", "isfinite"}, "np": None}
    inexact = {
        "log",
        "log2",
        "log1p",
        "exp",
        "exp2",
        "expm1",
        "cos",
        "sin",
        "tan",
        "power",
        "pow",
        "cbrt",
        "hypot",
        "tanh",
        "dot",
        "einsum",
    }
    for node in ast.walk(ast.parse((Path(__file__).parents[1] / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in exact:
            allowed = exact[node.value.id]
            assert node.attr in allowed if allowed else node.attr not in inexact, f"{name}:{node.lineno}"


def assert_close(found: float, exact: object) -> None:
    """Within 1 unit in the last place of a decimal of 60 digits."""
    with localcontext() as context:
        context.prec = 60
        wanted = exact()  # type: ignore[operator]
    assert abs(Fraction(found) - Fraction(wanted)) <= Fraction(math.ulp(float(wanted)))
