"""How long a command of these tests may take."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 20  # that any command may take here; a pipe that is waited for takes for ever

Told = Callable[..., str]


@contextmanager
def in_time() -> Iterator[None]:
    """Raise TimeoutError inside the block when it takes too long."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it did not end within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
