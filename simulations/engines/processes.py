"""Ending what a run started: all its processes, also those that left their parent's group, whatever interrupts the end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

END_SECONDS = 4.0  # that processes get to end after SIGTERM; Flower's SuperExec may need 10

_PROCESSES = Path("/proc")


def end_all(home: Path, leader: subprocess.Popen[bytes] | None) -> bool:
    """End `leader` and every process that works in `home`: SIGTERM to all, then SIGKILL to those that stay.

    Returns:
        Whether none is left.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal(home, leader, number)
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            reaped = leader is None or leader.poll() is not None
            if reaped and not living(home, leader):
                return True
            time.sleep(0.1)
    return False


def living(home: Path, leader: subprocess.Popen[bytes] | None = None) -> list[int]:
    """Ids of the processes that have `home` as FLWR_HOME or work in it; where there is no /proc, of `leader` alone.

    Both are looked at, because Ray's workers write their title over their environment.
    """
    if not _PROCESSES.is_dir():
        return [leader.pid] if leader is not None and leader.poll() is None else []
    mark = f"FLWR_HOME={home}".encode()
    found = []
    for folder in _PROCESSES.glob("[0-9]*"):
        try:
            works_there = Path(os.readlink(folder / "cwd")).is_relative_to(home)
            if works_there or mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # it ended, or belongs to someone else
    return found


def _signal(home: Path, leader: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
    for process in living(home, leader):
        try:
            if _PROCESSES.is_dir():
                os.kill(process, number)
            else:
                os.killpg(process, number)
        except ProcessLookupError:
            continue


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP, where nobody handles them, into SystemExit, so that `finally` clauses run."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handling({n: leave for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL}):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM: for cleaning up, which takes seconds."""
    with _handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
        yield


@contextmanager
def _handling(handlers: dict[signal.Signals, object]) -> Iterator[None]:
    """Set `handlers` and put the former ones back. Only the main thread can; elsewhere this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
