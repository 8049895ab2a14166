"""The SuperNode's waits: short while there is work, Flower's own otherwise, and none changed in a Flower that is not known."""

from __future__ import annotations

import inspect
import time
from importlib import import_module
from types import ModuleType

import pytest

import client.supernode
from client.supernode import LOOP, NO_MESSAGE, NO_REPLY, REPLY, SHORTEST, Waits, main, shorten, waits_of


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)

    def asked_until(self, waits: Waits, end: float) -> int:
        """How often a node without work asks until then."""
        asked = 0
        while self.now < end:
            waits.sleep(NO_MESSAGE)
            asked += 1
        return asked


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def waits(clock: Clock) -> Waits:
    return Waits(clock.sleep, lambda: clock.now)


def test_a_node_that_never_had_work_waits_as_flowers(waits: Waits, clock: Clock) -> None:
    for _ in range(3):
        waits.sleep(NO_MESSAGE)
    assert clock.slept == [NO_MESSAGE] * 3


def test_after_a_reply_waits_begin_short_and_grow_to_flowers(waits: Waits, clock: Clock) -> None:
    waits.sleep(NO_REPLY)
    assert clock.slept == [REPLY]
    replied = clock.now
    assert clock.asked_until(waits, replied + 1.9) == 10
    assert set(clock.slept[1:]) == {SHORTEST}
    assert 27 <= clock.asked_until(waits, replied + 30) <= 31
    assert all(wait <= 0.1 * (clock.now - replied) for wait in clock.slept[11:])
    clock.slept.clear()
    waits.sleep(NO_MESSAGE)
    waits.sleep(NO_MESSAGE)
    assert clock.slept == [NO_MESSAGE] * 2


def test_work_makes_waits_short_again_and_others_stay(waits: Waits, clock: Clock) -> None:
    waits.sleep(NO_MESSAGE)
    waits.sleep(NO_REPLY)
    waits.sleep(NO_MESSAGE)
    waits.sleep(7.0)
    assert clock.slept == [NO_MESSAGE, REPLY, SHORTEST, 7.0]


def test_flowers_loop_is_the_one_that_this_was_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails with a Flower whose loop has changed: look at it, then at client/supernode.py."""
    loop = import_module(LOOP)
    monkeypatch.setattr(loop, "time", time)  # put back afterwards
    assert waits_of(inspect.getsource(loop)) == [0.5, 0.5, 3]
    assert shorten(loop)
    assert isinstance(vars(loop)["time"], Waits)
    assert not shorten(loop)  # once


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time\nwhile x():\n    time.sleep(3)\ntime.sleep(0.5)", [0.5, 3]),
        ("import time\ntime.sleep(seconds)", None),
        ("import time\nstart = time.monotonic()\ntime.sleep(3)", None),
        ("import time\nnap = time.sleep\nnap(3)", None),
        ("import time\ntime.sleep('3')", None),
        ("from time import sleep\nsleep(3)", []),
    ],
)
def test_a_module_that_uses_time_otherwise_is_seen(source: str, found: list[float] | None) -> None:
    assert waits_of(source) == found


def test_another_flower_runs_as_it_is_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []
    monkeypatch.setattr("flwr.supernode.cli.flower_supernode", lambda: started.append("it"))
    monkeypatch.setattr("sys.argv", ["client.supernode", "--version"])
    other = ModuleType("other")
    assert not shorten(other)  # no source, no time
    assert vars(other).get("time") is None
    monkeypatch.setattr(client.supernode, "import_module", lambda name: other)
    main()
    assert started == ["it"]
    assert capsys.readouterr().err == (f"warning: {LOOP} is not that of Flower 1.41: rounds wait as long as Flower does.\n")
