"""How long the phases of a round take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Phases:
    """Seconds by phase: on the clock, and of CPU in this process (all threads)."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add what happens inside the `with` block to a phase, unless it raises."""
        begun, worked = time.monotonic(), time.process_time()
        yield
        self.wall[name] = self.wall.get(name, 0.0) + time.monotonic() - begun
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - worked
