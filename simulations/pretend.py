"""A client that answers at once with made-up numbers: to measure what the engine itself costs, and to try schedules.

Its numbers are named by round and client like those of a real one, so a digest depends on which updates were used.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from fedtune import wire
from fedtune.algorithms.coordinates import allocate, pool_size
from fedtune.config import RunConfig
from fedtune.layout import Layout
from fedtune.resident import resident
from fedtune.seeds import Stream
from fedtune.selftest import encode, self_test
from fedtune.wire import Status, Update

_ROUND, _DIGEST = slice(4, 8), slice(40, 56)  # in an instruction (docs/wire.md)


class PretendClient:
    """All clients of a FedKSeed or Ferret run. `cpu_seconds` is what its answers took, to be taken off a measurement."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        replica = resident(config).replica
        test = self_test(resident(config).algorithm.pool(config, replica.layout, 0))
        self._base = {"fingerprint": replica.fingerprint, "layout": replica.layout.digest, "selftest": encode(test)}
        self._counts = _counts(config, replica.layout)
        self.cpu_seconds = 0.0

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as fedtune's ClientApp would."""
        begun = time.process_time()
        client = str(context.node_config["partition-id"])
        if message.metadata.message_type == MessageType.QUERY:
            record = ConfigRecord({"client": client, "examples": 1 + int(client) % 7, **self._base})
        else:
            record = ConfigRecord({"payload": self._update(message, client)})
        reply = Message(RecordDict({"fedtune": record}), reply_to=message)
        self.cpu_seconds += time.process_time() - begun
        return reply

    def _update(self, message: Message, client: str) -> bytes:
        payload = message.content.config_records["fedtune"]["payload"]
        assert isinstance(payload, bytes)
        number = int.from_bytes(payload[_ROUND], "little")
        steps = self.config.local_steps
        scalars = Stream(self.config.seed, "pretend", number, client).normal(self._length).astype(np.float32)
        update = Update(number, payload[_DIGEST], Status.FINISHED, steps, 1 + int(client) % 7, 1.0, scalars, self._counts)
        return wire.encode_update(update, self.config.scalar_bits, client=client)

    @property
    def _length(self) -> int:
        return int(self._counts.sum()) or self.config.local_steps * self.config.directions_per_step


def _counts(config: RunConfig, layout: Layout) -> npt.NDArray[np.int64]:
    """int64 [L]: coordinates of each block, as if all had moved alike (Ferret); none for FedKSeed."""
    if config.algorithm != "ferret":
        return np.zeros(0, dtype=np.int64)
    sizes = np.array(layout.block_sizes)
    return allocate(np.sqrt(sizes), sizes, config.K, pool_size(config, layout), config.allocation)
