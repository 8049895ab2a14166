"""What a run says while it works: a few typed events, and the one place that listeners attach to.

The method and the server loop call `emit`; the command line's live table, plain log lines and tests listen. Emitting
without a listener costs a list check, so events are fine on hot paths (one per local step).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from fedtune.errors import Interrupted


@dataclass(frozen=True)
class Note:
    """Something worth a line: a choice and its reason, or a warning."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class RunStarted:
    """`parameters` are those that are tuned; `base_parameters` those of the base model, of which adapters are a few more."""

    algorithm: str
    rounds: int
    clients: int
    clients_per_round: int
    local_steps: int
    parameters: int
    base_parameters: int
    out: str


@dataclass(frozen=True)
class RoundStarted:
    round: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class ClientStep:
    """One local step is done. `loss` is the mean training loss of the step."""

    client: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class ClientFinished:
    """A client's update arrived (`problem` is empty) or was refused."""

    round: int
    client: str
    problem: str


@dataclass(frozen=True)
class EvaluationStep:
    """`done` of `total` held-out samples are evaluated (`what`: 'loss' or 'generate'), or batches of 'slopes'."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class RoundFinished:
    """`metrics` is the row of metrics.jsonl; round 0 is the base model."""

    round: int
    metrics: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFinished:
    """`summary` is summary.json."""

    summary: dict[str, object] = field(default_factory=dict)


Event = Note | RunStarted | RoundStarted | ClientStep | ClientFinished | EvaluationStep | RoundFinished | RunFinished
Listener = Callable[[Event], None]

_listeners: list[Listener] = []
_stop = threading.Event()
_request: ContextVar[Callable[[], None] | None] = ContextVar("request", default=None)


def emit(event: Event) -> None:
    """Tell every listener."""
    for listener in tuple(_listeners):
        listener(event)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have `listener` called with each event inside the `with` block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def heard() -> bool:
    """Whether anybody listens in this process."""
    return bool(_listeners)


def request_stop() -> None:
    """Ask the run in this process to stop after the step in hand (Ctrl-C)."""
    _stop.set()


def clear_stop() -> None:
    """Forget a request to stop, before a new run in the same process."""
    _stop.clear()


@contextmanager
def stoppable(check: Callable[[], None]) -> Iterator[None]:
    """Have `check_stop` inside the `with` block, in this thread only, call `check` too, which raises to stop the work.

    One request of several in a process can so be stopped alone.
    """
    token = _request.set(check)
    try:
        yield
    finally:
        _request.reset(token)


def check_stop() -> None:
    """Raise Interrupted if a stop was requested. Called between steps, where everything is consistent."""
    if _stop.is_set():
        raise Interrupted("Stopped by the user; the rounds that are finished are kept in the run folder.")
    check = _request.get()
    if check is not None:
        check()
