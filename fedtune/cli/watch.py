"""Watching a run: the right display for where the output goes, and Ctrl-C as a request to stop after the step in hand."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from rich.live import Live

from fedtune import progress
from fedtune.cli.lines import SIGN_OF_LIFE, LineLog, refusal
from fedtune.cli.live import LiveRun
from fedtune.cli.screen import Screen
from fedtune.cli.view import RunView
from fedtune.progress import ClientFinished, ClientStep, EvaluationStep, Event, Note

REFRESH = 5  # times a second
STOPPING = "Stopping after the step in hand; Ctrl-C again stops at once."


@contextmanager
def watching(*, quiet: bool = False, to_stderr: bool = False) -> Iterator[RunView]:
    """Show the run inside the `with` block, and let Ctrl-C stop it gently.

    Args:
        quiet: show nothing.
        to_stderr: keep stdout free for a result that a program reads.
    """
    screen = Screen(stderr=to_stderr)
    view = RunView()
    progress.clear_stop()
    with ExitStack() as stack:
        stack.enter_context(progress.listening(view))
        if not quiet:
            stack.enter_context(_display(view, screen))
        stack.enter_context(stoppable(view))
        yield view


@contextmanager
def saying_notes(screen: Screen) -> Iterator[None]:
    """Print notes inside the `with` block, for a command that has nothing else to show while it works."""

    def say(event: Event) -> None:
        if isinstance(event, Note):
            screen.say(event.text, "dim")

    with progress.listening(say):
        yield


@contextmanager
def saying_steps(screen: Screen) -> Iterator[None]:
    """Print a sign of life now and then inside the `with` block, for a command that takes steps outside a run."""
    spoke = [time.monotonic()]

    def say(event: Event) -> None:
        if time.monotonic() - spoke[0] < SIGN_OF_LIFE:
            return
        match event:
            case ClientStep():
                screen.say(f"client {event.client}, local step {event.step} of {event.steps}", "dim")
            case EvaluationStep():
                screen.say(f"{event.what}, {event.done} of {event.total}", "dim")
            case _:
                return
        spoke[0] = time.monotonic()

    with progress.listening(say):
        yield


@contextmanager
def _display(view: RunView, screen: Screen) -> Iterator[None]:
    if not screen.is_terminal:
        log = LineLog(view, screen.say)
        screen.say("loading model and data")
        with progress.listening(log):
            yield
        return
    with Live(LiveRun(view), console=screen, refresh_per_second=REFRESH):

        def above(event: Event) -> None:
            if isinstance(event, Note):
                screen.say(event.text, "yellow" if event.warning else "dim")
            elif isinstance(event, ClientFinished) and event.problem:
                screen.say(refusal(event), "yellow")

        with progress.listening(above):
            yield


@contextmanager
def stoppable(view: RunView) -> Iterator[None]:
    """Inside the `with` block the first Ctrl-C asks the run to stop after the step in hand, the second stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        progress.request_stop()
        view.stopping = True
        os.write(2, f"\n{STOPPING}\n".encode())  # print is not safe inside a signal handler

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
