"""Who a client is and how it introduces itself: what the ClientApp and the worker both know, without loading anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Identity:
    """Who a client is: a stable id, and its share of a simulated data set or the path of its own file."""

    client: str
    partition: int = 0
    data: str = ""


@dataclass(frozen=True)
class Introduction:
    """What a client tells the server before the first round."""

    client: str
    examples: int
    fingerprint: bytes
    layout: bytes
    selftest: bytes


class Trainer(Protocol):
    """What the ClientApp needs: a worker in this process, or the way to one in another."""

    def introduce(self, identity: Identity) -> Introduction:
        """Load model and data of `identity`, and say what it has."""

    def train(
        self, identity: Identity, message: bytes, held: Sequence[bytes], seconds: float = math.inf
    ) -> tuple[bytes, list[bytes]]:
        """One round: the encoded update, and the encoded pools to keep for the next. No step is begun after `seconds`."""
