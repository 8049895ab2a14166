"""What the screen knows about a run: events in, a few numbers out. Drawing is in live.py and lines.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fedtune.cli.rows import RoundRow
from fedtune.progress import (
    ClientFinished,
    ClientStep,
    EvaluationStep,
    Event,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
)


def fedavg_bytes(parameters: int, client_rounds: int) -> int:
    """Bytes that FedAvg moves for the same work: the model in float32 down and up again, each client, each round."""
    return 2 * 4 * parameters * client_rounds


@dataclass
class RunView:
    """The state of a run as its events tell it. `clock` returns seconds and only ever grows.

    Attributes:
        started: the run's size, None before it is known.
        rows: the finished rounds; round 0 is the base model.
        round, asked: the round in hand and its clients; 0 and () between rounds.
        evaluating: the evaluation in hand.
        stopping: the user asked to stop; finished: the run said that it is.
    """

    clock: Callable[[], float] = time.monotonic
    started: RunStarted | None = None
    rows: list[RoundRow] = field(default_factory=list)
    round: int = 0
    asked: tuple[str, ...] = ()
    evaluating: EvaluationStep | None = None
    stopping: bool = False
    finished: bool = False

    def __post_init__(self) -> None:
        self.began = self.clock()
        self._steps: dict[str, int] = {}
        self._last = ""
        self._earlier_steps = 0
        self._training_began: float | None = None
        self._earlier_rounds = 0

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case RunStarted():
                self.started = event
            case RoundStarted():
                self.round, self.asked, self._steps, self.evaluating = event.round, event.clients, {}, None
                if self._training_began is None:
                    self._training_began = self.clock()
            case ClientStep():
                self._steps[event.client] = event.step
                self._last, self.evaluating = event.client, None
            case ClientFinished():
                self._steps[event.client] = self._local_steps
            case EvaluationStep():
                self.evaluating = event if event.done < event.total else None
            case RoundFinished():
                self._finish_round(event)
            case RunFinished():
                self.finished = True

    def _finish_round(self, event: RoundFinished) -> None:
        self._earlier_rounds += event.round > 0 and not self.round  # of a process before this one
        self.rows.append(RoundRow.of(event.metrics))
        self._earlier_steps += len(self.asked) * self._local_steps
        self.round, self.asked, self._steps, self.evaluating = 0, (), {}, None

    # ------------------------------------------------------------------ derived numbers

    @property
    def _local_steps(self) -> int:
        return self.started.local_steps if self.started else 0

    @property
    def steps(self) -> tuple[int, int]:
        """Local steps done and in all, in the round in hand, over its clients."""
        return sum(tuple(self._steps.values())), len(self.asked) * self._local_steps

    @property
    def elapsed(self) -> float:
        """Seconds since the view was made."""
        return self.clock() - self.began

    @property
    def seconds_left(self) -> float | None:
        """Estimate for the rest of the run from its local steps so far (evaluations included); None before there are any."""
        if self.started is None or self._training_began is None:
            return None
        done = self._earlier_steps + self.steps[0]
        total = (self.started.rounds - self._earlier_rounds) * self.started.clients_per_round * self._local_steps
        if not done:
            return None
        return (self.clock() - self._training_began) / done * max(0, total - done)

    @property
    def payload(self) -> int:
        """Payload bytes of all finished rounds, both directions."""
        return sum(row.bytes_up + row.bytes_down for row in self.rows)

    @property
    def fedavg(self) -> int:
        """What FedAvg would have moved for the finished rounds."""
        return fedavg_bytes(self.started.base_parameters, sum(row.messages_down for row in self.rows)) if self.started else 0

    @property
    def doing(self) -> str:
        """The work in hand in a few words."""
        if self.started is None:
            return "loading model and data"
        if self.evaluating is not None:
            verb = {"loss": "evaluating", "generate": "generating"}.get(self.evaluating.what, self.evaluating.what)
            return f"{verb}, {self.evaluating.done} of {self.evaluating.total} samples"
        if self.round:
            done, total = self.steps
            client = f", client {self._last}" if self._last in self._steps else ""
            return f"round {self.round} of {self.started.rounds}{client}, local step {done} of {total}"
        if not self.rows:
            return "waiting for clients, then evaluating the base model"
        return "finishing" if self.finished else "between rounds"
