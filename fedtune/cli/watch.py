"""Watching a run: the right display for where the output goes, and Ctrl-C as a request to stop after the step in hand."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from rich.live import Live

from fedtune import progress
from fedtune.cli.lines import LineLog, refusal
from fedtune.cli.live import LiveRun
from fedtune.cli.screen import Screen
from fedtune.cli.view import RunView
from fedtune.progress import ClientFinished, Event, Note

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
