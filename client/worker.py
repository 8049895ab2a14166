"""The part of a client that computes: it owns the model and the data, takes an instruction and returns an update.

Bytes in, bytes out, no Flower: the ClientApp forwards to it in process now, and a separate long-lived process can offer
the same two calls. One worker serves any number of simulated clients, one after another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fedtune import wire
from fedtune.algorithms.base import pool_number
from fedtune.coefficients import Coefficients, PoolCoefficients
from fedtune.config import RunConfig
from fedtune.data.encode import Encoded
from fedtune.data.federated import load_local
from fedtune.directions import Pool
from fedtune.errors import ConfigError, MismatchError, StaleReplicaError
from fedtune.resident import Resident, resident


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


class Worker:
    """Trains for clients of one run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def _resident(self) -> Resident:
        return resident(self.config)

    def introduce(self, identity: Identity) -> Introduction:
        """Load model and data, and say which base model and how many samples this client has."""
        replica = self._resident.replica
        examples = len(self._samples(identity))
        return Introduction(identity.client, examples, replica.fingerprint, replica.layout.digest)

    def train(
        self, identity: Identity, message: bytes, held: Sequence[bytes], seconds: float = math.inf
    ) -> tuple[bytes, list[bytes]]:
        """One round: rebuild the model of the instruction, run the local steps, encode the update.

        Args:
            identity: the client.
            message: the encoded instruction.
            held: encoded pools that this client kept from earlier rounds.
            seconds: from now on, after which no further local step is begun.

        Returns:
            The encoded update, and the pools to keep for the next round.

        Raises:
            StaleReplicaError: the message builds upon pools that the client does not hold.
            WireError: the message is damaged or for another model; nothing was changed.
        """
        deadline = time.monotonic() + seconds
        here, config = self._resident, self.config
        replica, algorithm = here.replica, here.algorithm
        blocks, bits = replica.layout.blocks, config.coefficient_bits
        most_pools = pool_number(config, config.rounds) + 1
        instruction = wire.decode_instruction(message, self._pool, most_pools, blocks, bits)
        if instruction.fingerprint != replica.fingerprint or instruction.layout != replica.layout.digest:
            raise MismatchError(
                "The server trains another base model: client and server need the same files, dtype and algorithm."
            )
        if instruction.held > len(held):
            raise StaleReplicaError(f"The message builds upon {instruction.held} pools; this client holds {len(held)}.")
        used = held[: instruction.held]
        known = [_stored_pool(kept, self._pool(number), blocks, bits) for number, kept in enumerate(used)]
        everything = Coefficients((*known, *instruction.pools))
        replica.become(everything, instruction.digest)
        replica.touch()
        work = here.work(identity.client, self._samples(identity), instruction.round, instruction.pools[-1].pool)
        update = algorithm.local_update(replace(work, deadline=deadline), config, instruction)
        keep = [*used, *(wire.encode_pool(pool, bits) for pool in instruction.pools[:-1])]
        return wire.encode_update(update, config.scalar_bits), keep

    def _samples(self, identity: Identity) -> tuple[Encoded, ...]:
        if identity.data:
            return _own_file(self.config, identity.data)
        shares = self._resident.data.clients
        if identity.partition >= len(shares):
            raise ConfigError(
                f"This node is client {identity.partition} but the data is divided over {len(shares)}: "
                "set clients to the number of nodes, or give the node its own file with --node-config 'data=\"PATH\"'."
            )
        return shares[identity.partition]

    def _pool(self, number: int) -> Pool:
        here = self._resident
        return here.algorithm.pool(self.config, here.replica.layout, number)


@lru_cache(maxsize=64)
def _own_file(config: RunConfig, path: str) -> tuple[Encoded, ...]:
    return load_local(config, resident(config).language_model.tokenizer, path)


@lru_cache(maxsize=512)
def _stored_pool(data: bytes, pool: Pool, blocks: int, bits: int) -> PoolCoefficients:
    return wire.decode_pool(data, pool, blocks, bits)


@lru_cache(maxsize=2)
def worker(config: RunConfig) -> Worker:
    """The worker of this process for `config`."""
    return Worker(config)
