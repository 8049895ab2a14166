"""Runs a reader on many inputs: it may refuse them with the errors that it names, in bounded time and memory, and nothing else.

`fuzz` makes a test of a property with few examples, always the same, and one with many behind the marker `fuzz`, whose
number is FEDTUNE_FUZZ. docs/wire.md says how to run them.
"""

from __future__ import annotations

import inspect
import os
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import HypothesisWarning
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")
LARGEST = 1 << 16  # bytes of an input
MOST_SECONDS, MOST_BYTES = 1.0, 64 << 20  # for an input of LARGEST bytes
MEASURED = 8  # one input of so many is measured for memory, which costs several times its reading
LONG = int(os.environ.get("FEDTUNE_FUZZ", "20000"))


def fuzz(inputs: SearchStrategy[Any], short: int = 150) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the property is tested on `short` inputs, and on LONG ones with `-m fuzz`.

    The property's last parameter takes the input, or is `data` of hypothesis's `data()`; `folder` is an empty one, and the
    other parameters are fixtures.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        *fixtures, given_as = _in_order(check)

        @pytest.mark.parametrize("examples", [short, pytest.param(LONG, marks=pytest.mark.fuzz, id="long")])
        def test(examples: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
            known = {name: tmp_path if name == "folder" else request.getfixturevalue(name) for name in fixtures}
            seen = [0]

            def once(found: Any) -> None:
                seen[0] += 1
                check(**known, **{given_as: found})

            rules = settings(
                max_examples=examples,
                derandomize=examples != LONG,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Generating overly large repr", HypothesisWarning)  # of an input that failed
                rules(given(inputs)(once))()
            assert seen[0] >= min(examples, 20), "the strategy has hardly any inputs"

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def _in_order(check: Callable[..., None]) -> list[str]:
    """The parameters of a property, that of the input last: `data`, `found` or `text`."""
    names = list(inspect.signature(check).parameters)
    (given_as,) = {"data", "found", "text"} & set(names)
    return [*(name for name in names if name != given_as), given_as]


def bounded(
    data: bytes,
    read: Callable[[bytes], T],
    refusals: type[Exception] | tuple[type[Exception], ...],
    *,
    measured: bool | None = None,
) -> T | None:
    """What `read` makes of `data`; None if it refused it. Fails if it took too long or too much, or raised anything else.

    Memory is measured, and time is not, if `measured` says so, else for one input of MEASURED.
    """
    measured = zlib.crc32(data) % MEASURED == 0 if measured is None else measured
    found, peak, refused = None, 0, "why"
    if measured:
        tracemalloc.start()
    begun = time.thread_time()
    try:
        found = read(data)
    except refusals as refusal:
        refused = str(refusal).strip()
    finally:
        seconds = time.thread_time() - begun
        if measured:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert refused, "a refusal without a reason"
    assert peak <= MOST_BYTES, f"{len(data):,} bytes of input took {peak:,} bytes of memory"
    assert measured or seconds <= MOST_SECONDS, f"{len(data):,} bytes of input took {seconds:.2f} s"
    return found
