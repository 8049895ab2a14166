"""One thread that works on one request after another, each of which can be cancelled alone.

A device does one thing at a time, and torch and numba keep settings by thread, so all computation of a worker happens
in this thread, in the order of arrival; the threads of the transport only wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

from fedtune.errors import Interrupted, WorkerError
from fedtune.progress import Event, listening, stoppable

MOST_WAITING = 32
"""Requests that wait or work at a time; a node has one at a time, so this is more nodes than share a device."""

T = TypeVar("T")


class _End:
    """The last thing that a ticket says."""


class Ticket(Generic[T]):
    """A request: it waits, works and ends. Created by `Jobs.submit`.

    Attributes:
        name: of the request.
        seconds: that its work took.
    """

    def __init__(self, name: str, work: Callable[[], T], label: str = "") -> None:
        self.name, self.seconds = name, 0.0
        self._label = label or name
        self._work = work
        self._said: SimpleQueue[Event | _End] = SimpleQueue()
        self._cancelled = threading.Event()
        self._turn = threading.Lock()
        self._begun = False
        self._outcome: T | None = None
        self._error: BaseException | None = None

    def __str__(self) -> str:
        return self._label

    def events(self) -> Iterator[Event]:
        """What the work says, as it says it, until it ends."""
        while not isinstance(event := self._said.get(), _End):
            yield event

    def result(self) -> T:
        """What came of it, after the last event. Raises what the work raised, or Interrupted if it was cancelled."""
        error, self._error = self._error, None  # a traceback holds the tensors of its frames
        if error is not None:
            raise error
        return self._outcome  # type: ignore[return-value]  # set by run, if nothing was raised

    def cancel(self) -> None:
        """End it: at once if it still waits, else after the step in hand."""
        self._cancelled.set()
        with self._turn:
            if not self._begun:
                self._begun = True
                self._error = Interrupted("The request was cancelled before its work began.")
                self._said.put(_End())

    def run(self) -> None:
        """Do the work, in the thread that calls; never raises. `end` must follow."""
        with self._turn:
            if self._begun:
                return
            self._begun = True
        thread, started = threading.get_ident(), time.monotonic()

        def note(event: Event) -> None:
            if threading.get_ident() == thread:
                self._said.put(event)

        try:
            with listening(note), stoppable(self._check):
                self._outcome = self._work()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - started

    def end(self) -> None:
        """Let whoever reads the events go on to the result."""
        self._said.put(_End())

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Interrupted("The request was cancelled; its work stopped after the step in hand.")


class Jobs:
    """The thread and what waits for it.

    Attributes:
        finished: requests that ended, however they did.
        seconds: that they took in all.
        closed: nothing more is taken.
    """

    def __init__(self) -> None:
        self.finished, self.seconds = 0, 0.0
        self._waiting: SimpleQueue[Ticket[object] | None] = SimpleQueue()
        self._open: dict[str, Ticket[object]] = {}
        self._lock = threading.Lock()
        self.closed = False
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, name: str, work: Callable[[], T], label: str = "") -> Ticket[T]:
        """Have `work` done when its turn comes; `label` is how the log calls it.

        Raises:
            WorkerError: too many wait, one of that name does, or the worker is about to end.
        """
        ticket = Ticket(name, work, label)
        with self._lock:
            if self.closed:
                raise WorkerError("The worker is about to end: try again, and another one is started.")
            if name in self._open:
                raise WorkerError(f"There is a request '{name}' already: every request needs a name of its own.")
            if len(self._open) >= MOST_WAITING:
                raise WorkerError(f"{MOST_WAITING} requests wait for this worker: give the nodes more devices, or fewer nodes.")
            self._open[name] = ticket  # type: ignore[assignment]  # its result is read by whoever submitted it
            self._waiting.put(ticket)  # type: ignore[arg-type]
        return ticket

    def cancel(self, name: str) -> bool:
        """Cancel the request called `name`; whether there is one."""
        with self._lock:
            ticket = self._open.get(name)
        if ticket is not None:
            ticket.cancel()
        return ticket is not None

    @property
    def busy(self) -> int:
        """Requests that wait or work."""
        return len(self._open)

    def idle_seconds(self) -> float:
        """For how long there was nothing to do."""
        with self._lock:
            return 0.0 if self._open else time.monotonic() - self._since

    def close(self, seconds: float) -> bool:
        """Take nothing more, cancel what there is and wait for the thread; whether it ended in `seconds`."""
        with self._lock:
            self.closed = True
            tickets = list(self._open.values())
            self._waiting.put(None)
        for ticket in tickets:
            ticket.cancel()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (ticket := self._waiting.get()) is not None:
            ticket.run()
            with self._lock:
                del self._open[ticket.name]
                self.finished += 1
                self.seconds += ticket.seconds
                self._since = time.monotonic()
            ticket.end()
            del ticket  # and what it holds, while the thread waits for the next
