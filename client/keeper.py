"""What a long-lived worker keeps between requests, and when it lets go of it.

Model, data and pools are caches. The model is loaded anew when another one is asked for or when a file of its folder or
of the data was changed since; pools are used only if they lead to the state that the message names.
"""

from __future__ import annotations

import gc
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from client.identity import Identity, Introduction
from client.pools import KeptPools
from fedtune.config import RunConfig
from fedtune.errors import StaleReplicaError, WireError

if TYPE_CHECKING:
    from fedtune.resident import Resident


@dataclass(frozen=True)
class Loaded:
    """What is loaded: the model's name, its device and fingerprint; and how often one was loaded."""

    model: str = ""
    device: str = ""
    fingerprint: bytes = b""
    loads: int = 0


class Keeper:
    """Answers requests, one at a time, in one thread. Torch and the method are imported at the first one.

    Attributes:
        loaded: a value that other threads may read.
    """

    def __init__(self) -> None:
        self.loaded = Loaded()
        self._pools = KeptPools()
        self._here: weakref.ref[Resident] | None = None

    def introduce(self, config: RunConfig, identity: Identity) -> Introduction:
        """As `Worker.introduce`."""
        self._load(config)
        from client.worker import worker

        return worker(config).introduce(identity)

    def train(
        self, config: RunConfig, run: str, identity: Identity, message: bytes, held: Sequence[bytes], end: float
    ) -> tuple[bytes, list[bytes]]:
        """As `Worker.train`; if the client has lost its pools, with those that the worker kept for it.

        After `end`, a moment of `time.monotonic`, no further local step is begun: time in the queue and for loading counts.
        """
        self._load(config)
        from client.worker import worker

        try:
            update, keep = worker(config).train(identity, message, held, end - time.monotonic())
        except StaleReplicaError:
            kept = self._pools.of(run, identity.client)
            if len(kept) <= len(held):
                raise
            try:
                update, keep = worker(config).train(identity, message, kept, end - time.monotonic())
            except WireError:
                self._pools.drop(run, identity.client)
                raise StaleReplicaError("The pools that the worker kept lead to another state; they were dropped.") from None
        self._pools.keep(run, identity.client, keep)
        return update, keep

    def _load(self, config: RunConfig) -> None:
        """Have the model of `config` in memory, alone, from the files as they are now."""
        from fedtune.resident import renewed

        here = renewed(config)  # drops the one before if it is another
        if self._here is not None and self._here() is here:
            return
        self._let_go()
        lm, fingerprint = here.language_model, here.replica.fingerprint
        self.loaded = Loaded(lm.source, str(lm.device), fingerprint, self.loaded.loads + 1)
        self._here = weakref.ref(here)

    def _let_go(self) -> None:
        """Free the memory of a model that is not used any more, before another one is loaded."""
        self._here = None
        self.loaded = Loaded(loads=self.loaded.loads)
        gc.collect()
        torch = sys.modules["torch"]
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
