"""The thread that works: order, one cancelled request among others, events by thread, and the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from client.jobs import MOST_WAITING, Jobs
from fedtune.errors import Interrupted, WorkerError
from fedtune.progress import Note, check_stop, emit


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs()
    yield made
    assert made.close(5.0)


def endless(begun: threading.Event) -> None:
    begun.set()
    while True:
        check_stop()


def test_one_after_another_in_the_order_of_arrival_in_one_thread(jobs: Jobs) -> None:
    order: list[tuple[int, int]] = []
    tickets = [jobs.submit(str(n), lambda n=n: order.append((n, threading.get_ident()))) for n in range(20)]
    for ticket in tickets:
        assert list(ticket.events()) == []
        ticket.result()
    assert [n for n, _ in order] == list(range(20))
    assert len({thread for _, thread in order}) == 1
    assert jobs.close(5.0)
    assert (jobs.finished, jobs.busy) == (20, 0)


def test_a_request_hears_its_own_events_only(jobs: Jobs) -> None:
    def work() -> str:
        other = threading.Thread(target=emit, args=(Note("of another thread"),))
        other.start()
        other.join()
        emit(Note("mine"))
        return "done"

    ticket = jobs.submit("a", work)
    assert list(ticket.events()) == [Note("mine")]
    assert ticket.result() == "done"


def test_cancelling_one_leaves_the_others(jobs: Jobs) -> None:
    begun = threading.Event()
    working = jobs.submit("working", lambda: endless(begun))
    waiting = jobs.submit("waiting", lambda: 1)
    after = jobs.submit("after", lambda: 2)
    begun.wait()
    assert jobs.cancel("waiting")
    assert list(waiting.events()) == []  # at once, though the one before still works
    with pytest.raises(Interrupted, match="cancelled before its work began"):
        waiting.result()
    assert jobs.cancel("working")
    with pytest.raises(Interrupted, match="stopped after the step in hand"):
        list(working.events()) or working.result()
    assert list(after.events()) == []
    assert after.result() == 2
    assert not jobs.cancel("nobody")


def test_what_the_work_raises_is_raised_where_it_was_asked_for(jobs: Jobs) -> None:
    ticket = jobs.submit("a", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        list(ticket.events()) or ticket.result()


def test_too_many_and_twice_the_same_name_are_refused(jobs: Jobs) -> None:
    begun = threading.Event()
    jobs.submit("0", lambda: endless(begun))
    with pytest.raises(WorkerError, match="There is a request '0' already"):
        jobs.submit("0", lambda: None)
    for number in range(1, MOST_WAITING):
        jobs.submit(str(number), lambda: None)
    with pytest.raises(WorkerError, match="32 requests wait for this worker"):
        jobs.submit("one more", lambda: None)


def test_closing_cancels_what_there_is_and_takes_nothing_more() -> None:
    jobs, begun = Jobs(), threading.Event()
    working = jobs.submit("working", lambda: endless(begun))
    begun.wait()
    assert jobs.idle_seconds() == 0.0
    assert jobs.close(5.0)
    assert jobs.idle_seconds() >= 0.0
    with pytest.raises(Interrupted):
        list(working.events()) or working.result()
    with pytest.raises(WorkerError, match="about to end"):
        jobs.submit("late", lambda: None)
