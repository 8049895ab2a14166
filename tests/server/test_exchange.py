"""How long the server waits for silent clients: with a clock and a grid that tests move, nothing waits for real."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import server.exchange
from server.exchange import LEAST_GRACE, NOT_SENT, Patience, exchange
from server.replies import looks_usable
from simulations.engines import flower_internals as internals

TIMEOUT = 3600.0


class Clock:
    """Stands still but for `sleep`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class TimedGrid:
    """Node n answers `after[n]` seconds after it was asked; `records` has what else than an update it says."""

    def __init__(self, clock: Clock, after: dict[int, float], records: dict[int, dict[str, object]] | None = None) -> None:
        self.clock, self.after, self.records = clock, after, records or {}
        self.due: dict[str, tuple[float, Message]] = {}
        self.pulled: list[int] = []

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            node = message.metadata.dst_node_id
            internals.give_id(message, f"m{len(self.due)}")
            record = ConfigRecord(self.records.get(node, {"payload": b"update"}))
            reply = Message(RecordDict({"fedtune": record}), reply_to=message)
            self.due[message.metadata.message_id] = (self.clock.now + self.after[node], reply)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids: list[str]) -> list[Message]:
        found = [self.due[i][1] for i in ids if self.due[i][0] <= self.clock.now]
        self.pulled += [reply.metadata.src_node_id for reply in found]
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    internals.adopt_identity(1)
    found = Clock()
    monkeypatch.setattr(server.exchange, "time", SimpleNamespace(monotonic=found.monotonic, sleep=found.sleep))
    return found


def ask(clock: Clock, grid: TimedGrid, *, enough: int = 0, grace: float = 3.0) -> tuple[list[int], float, str]:
    """Who answered in time, after how many seconds the round closed, and why."""
    messages = [Message(RecordDict(), node, "train") for node in grid.after]
    patience = Patience(timeout=TIMEOUT, grace=grace, enough=enough or -(-len(messages) // 2))
    began = clock.now
    return taken(grid, messages, patience), clock.now - began, patience.closed


def taken(grid: object, messages: list[Message], patience: Patience, *, one_by_one: bool = False) -> list[int]:
    """The nodes whose answers an exchange took, in order of their numbers."""
    came: list[int] = []

    def take(replies: list[Message]) -> int:
        came.extend(reply.metadata.src_node_id for reply in replies)
        return sum(map(looks_usable, replies))

    exchange(grid, messages, patience, take, one_by_one=one_by_one)  # type: ignore[arg-type]
    return sorted(came)


def test_when_all_have_answered_it_closes_at_once(clock: Clock) -> None:
    answered, took, why = ask(clock, TimedGrid(clock, {2: 100.0, 3: 200.0, 4: 300.0}))
    assert (answered, why) == ([2, 3, 4], NOT_SENT)
    assert took == pytest.approx(300.0, abs=1.0)


def test_a_silent_client_is_waited_for_three_times_as_long_as_half_of_the_others_took(clock: Clock) -> None:
    answered, took, why = ask(clock, TimedGrid(clock, {2: 50.0, 3: 100.0, 4: 390.0, 5: 1e9}))
    assert answered == [2, 3, 4]  # the third within the grace
    assert took == pytest.approx(100.0 + 3 * 100.0, abs=1.0)
    assert why == "no answer; the round closed after 400 s, 300 s after 3 of 4 had answered: raise grace"


def test_the_grace_is_half_a_minute_at_least(clock: Clock) -> None:
    _, took, _ = ask(clock, TimedGrid(clock, {2: 0.0, 3: 0.5, 4: 1e9}))
    assert took == pytest.approx(0.5 + LEAST_GRACE, abs=1.0)


def test_without_grace_the_whole_time_is_waited_for(clock: Clock) -> None:
    answered, took, why = ask(clock, TimedGrid(clock, {2: 1.0, 3: 1.0, 4: 3000.0, 5: 1e9}), grace=0.0)
    assert answered == [2, 3, 4]
    assert took == pytest.approx(TIMEOUT, abs=1.0)
    assert why == "no answer within 3600 s"


def test_the_whole_time_is_never_exceeded(clock: Clock) -> None:
    _, took, why = ask(clock, TimedGrid(clock, {2: 2000.0, 3: 1e9}))
    assert took == pytest.approx(TIMEOUT, abs=1.0)
    assert why == "no answer within 3600 s"


def test_errors_and_problems_do_not_start_the_grace(clock: Clock) -> None:
    """Two of four fail at once: an attacker cannot hurry the honest ones so."""
    spoilt: dict[int, dict[str, object]] = {2: {"problem": "DataError", "text": "x"}, 3: {"payload": "text"}}
    answered, took, _ = ask(clock, TimedGrid(clock, {2: 0.0, 3: 0.0, 4: 500.0, 5: 1000.0}, spoilt))
    assert answered == [2, 3, 4, 5]
    assert took == pytest.approx(1000.0, abs=1.0)


def test_clients_that_work_one_after_another_are_all_waited_for(clock: Clock) -> None:
    """As in a simulation with one worker: client i answers after i steps of the same length."""
    for count in (2, 3, 10, 25):
        answered, _, why = ask(clock, TimedGrid(clock, {2 + i: 40.0 * (i + 1) for i in range(count)}))
        assert len(answered) == count
        assert why == NOT_SENT


def test_a_second_exchange_has_the_grace_that_the_first_one_earned(clock: Clock) -> None:
    """Who says that it lacks pools and is silent then holds nobody either."""
    patience = Patience(timeout=TIMEOUT, grace=3.0, enough=2)
    first = TimedGrid(clock, {2: 20.0, 3: 20.0, 4: 30.0})
    taken(first, [Message(RecordDict(), node, "train") for node in first.after], patience)
    began = clock.now
    late = TimedGrid(clock, {4: 1e9})
    assert taken(late, [Message(RecordDict(), 4, "train")], patience) == []
    assert clock.now - began == pytest.approx(3 * 20.0, abs=1.0)
    assert "raise grace" in patience.closed
    assert taken(late, [], patience) == []


def test_what_could_not_be_sent_is_not_waited_for(clock: Clock) -> None:
    """Flower gives no id to a message that it did not take."""
    grid = SimpleNamespace(push_messages=lambda messages: [None, None])
    patience = Patience(timeout=TIMEOUT, grace=3.0, enough=1)
    for one_by_one in (False, True):
        assert taken(grid, [Message(RecordDict(), 2, "train")], patience, one_by_one=one_by_one) == []


def test_large_messages_go_out_one_by_one_and_what_has_come_is_taken_in_between(clock: Clock) -> None:
    grid = TimedGrid(clock, {2: 0.0, 3: 20.0, 4: 0.0})
    pushed, push = list[int](), grid.push_messages

    def count(messages: list[Message]) -> list[str]:
        pushed.append(len(messages))
        return push(messages)

    grid.push_messages = count  # type: ignore[method-assign]
    patience = Patience(timeout=TIMEOUT, grace=3.0, enough=2)
    messages = [Message(RecordDict(), node, "train") for node in grid.after]
    assert taken(grid, messages, patience, one_by_one=True) == [2, 3, 4]
    assert pushed == [1, 1, 1]
    assert grid.pulled[:2] == [2, 4]
