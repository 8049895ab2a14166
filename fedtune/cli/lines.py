"""A run as plain log lines, for files, pipes and `--json`: one line a round, and a sign of life in long ones."""

from __future__ import annotations

from collections.abc import Callable

from fedtune.cli.numbers import in_about, in_bytes, in_loss, in_time
from fedtune.cli.rows import RoundRow
from fedtune.cli.view import RunView
from fedtune.foreign import for_file
from fedtune.progress import ClientFinished, Event, Note, RoundFinished, RunStarted

SIGN_OF_LIFE = 10.0
"""Seconds of silence after which the next event prints a line about the work in hand."""


class LineLog:
    """Prints a run line by line. `write` takes one line without its newline, which may go to a screen, a file or a log."""

    def __init__(self, view: RunView, write: Callable[[str], None]) -> None:
        self._view, self._write = view, write
        self._spoke = view.elapsed

    def __call__(self, event: Event) -> None:
        """Print what `event` is worth; the view has taken it in already."""
        match event:
            case Note():
                self._say(("warning: " if event.warning else "") + event.text)
            case RunStarted():
                self._say(headline(event))
            case ClientFinished() if event.problem:
                self._say(refusal(event))
            case RoundFinished():
                self._say(round_line(self._view.rows[-1]))
            case _ if self._view.elapsed - self._spoke >= SIGN_OF_LIFE:
                left = self._view.seconds_left
                self._say(self._view.doing + (f", about {in_about(left)} left" if left is not None else ""))

    def _say(self, line: str) -> None:
        self._spoke = self._view.elapsed
        self._write(for_file(line))


def round_line(row: RoundRow) -> str:
    """A finished round in one line."""
    if row.round == 0:
        parts = ["base model"]
    else:
        refused = f" ({row.refused} refused)" if row.refused else ""
        parts = [f"round {row.round}", f"{row.clients} clients{refused}", f"train loss {in_loss(row.train_loss)}"]
    if row.eval_loss is not None:
        parts.append(f"held-out loss {in_loss(row.eval_loss)}")
    if row.accuracy is not None:
        parts.append(f"accuracy {in_loss(row.accuracy)}")
    if row.rouge_l is not None:
        parts.append(f"ROUGE-L {in_loss(row.rouge_l)}")
    if row.round:
        parts.append(f"up {in_bytes(row.up_per_client)} down {in_bytes(row.down_per_client)} a client")
    return ", ".join([*parts, in_time(row.seconds)])


def refusal(event: ClientFinished) -> str:
    """Why a client's update is not used, in one line."""
    return f"warning: round {event.round}, client {event.client}: {event.problem}"


def headline(started: RunStarted) -> str:
    """The run in one line."""
    return (
        f"{started.algorithm}: {started.parameters:,} parameters, {started.clients_per_round} of {started.clients} clients "
        f"a round, {started.local_steps} local steps, {started.rounds} rounds, in {started.out}"
    )
