"""The part of a client that computes: it owns the model and the data, takes an instruction and returns an update.

Bytes in, bytes out, no Flower: the ClientApp calls it in this process (a simulation), or forwards to the long-lived
process of `service.py`, which offers the same two calls. One worker serves any number of clients, one after another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from client.identity import Identity, Introduction
from client.pools import MOST_OF_A_MODEL, DecodedPools, leading
from fedtune import wire
from fedtune.algorithms.base import most_pools
from fedtune.coefficients import Coefficients, PoolCoefficients
from fedtune.config import RunConfig
from fedtune.data.encode import Encoded
from fedtune.directions import Pool
from fedtune.errors import ConfigError, MalformedMessageError, MismatchError, StaleReplicaError, WireError
from fedtune.resident import Resident, resident
from fedtune.scratch import trim
from fedtune.selftest import encode, self_test


class Worker:
    """Trains for clients of one run; of an earlier one it finds the model and the data at most (`fedtune.resident`)."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def introduce(self, identity: Identity) -> Introduction:
        """Load model and data, and say which base model, how many samples and which directions this client has."""
        here = resident(self.config)
        replica = here.replica
        examples = len(self._samples(here, identity))
        pool = here.algorithm.pool(self.config, replica.layout, 0)
        test = encode(self_test(pool, str(here.language_model.device)))
        return Introduction(identity.client, examples, replica.fingerprint, replica.layout.digest, test)

    def train(
        self, identity: Identity, message: bytes, held: Sequence[bytes], seconds: float = math.inf
    ) -> tuple[bytes, list[bytes]]:
        """One round: rebuild the model of the instruction, run the local steps, encode the update.

        Args:
            identity: the client.
            message: the encoded instruction.
            held: encoded pools that this client kept from the round that it answered last; the last of them was open.
            seconds: from now on, after which no further local step is begun.

        Returns:
            The encoded update, and the pools to keep for the next round.

        Raises:
            StaleReplicaError: the message builds upon pools that the client does not hold, or holds otherwise.
            WireError: the message is damaged or for another model; nothing was changed.
        """
        deadline = time.monotonic() + seconds
        here, config = resident(self.config), self.config
        replica, algorithm = here.replica, here.algorithm
        blocks, bits = replica.layout.blocks, config.coefficient_bits
        most = partial(most_pools, config)

        def pool_at(number: int) -> Pool:
            return algorithm.pool(config, replica.layout, number)

        kept = _Kept(held, pool_at, blocks, bits)
        instruction = wire.decode_instruction(message, pool_at, most, blocks, bits, kept.pool)
        if instruction.fingerprint != replica.fingerprint or instruction.layout != replica.layout.digest:
            raise MismatchError(
                "The server trains another base model: client and server need the same files, dtype and algorithm."
            )
        everything = Coefficients((*kept.first(instruction.held), *instruction.pools))
        try:
            replica.become(everything, instruction.digest)
        except MismatchError:
            if kept.used:
                raise StaleReplicaError("What this client kept does not lead to the model that the server announced.") from None
            raise
        work = here.work(config, identity.client, self._samples(here, identity), instruction.round, everything)
        update = algorithm.local_update(replace(work, deadline=deadline), config, instruction)
        differs = [pool for pool in instruction.pools if not pool.pool.disjoint]  # the others are never built upon
        keep = leading([*held[: instruction.held], *(wire.encode_pool(pool, bits) for pool in differs)])
        chosen = bool(instruction.counts.size)  # by the server, which knows them
        trim()  # gradients and activations
        sent = wire.encode_update(update, config.scalar_bits, client=identity.client, with_counts=not chosen)
        return sent, keep

    def _samples(self, here: Resident, identity: Identity) -> tuple[Encoded, ...]:
        if identity.data and self.config.algorithm == "central":
            raise ConfigError("algorithm = central trains on the data of all clients in one place: leave the node's data away.")
        if identity.data:
            return here.own_file(identity.data)
        shares = here.data.clients
        if identity.partition >= len(shares):
            raise ConfigError(
                f"This node is client {identity.partition} but the data is divided over {len(shares)}: "
                "set clients to the number of nodes, or give the node its own file with --node-config 'data=\"PATH\"'."
            )
        return tuple(here.algorithm.samples(shares, identity.partition))


class _Kept:
    """The pools that a client kept, decoded when a message builds upon them; a damaged one counts as lost."""

    def __init__(self, held: Sequence[bytes], pool_at: Callable[[int], Pool], blocks: int, bits: int) -> None:
        self._held, self._pool_at, self._blocks, self._bits = held, pool_at, blocks, bits
        self.used = False

    def pool(self, number: int) -> PoolCoefficients | None:
        """What the client has of pool `number`, if anything."""
        self.used = True
        if number >= len(self._held):
            return None
        try:
            return _decoded.of(self._held[number], self._pool_at(number), self._blocks, self._bits, wire.decode_pool)
        except WireError:
            return None

    def first(self, count: int) -> list[PoolCoefficients]:
        """The first `count` pools.

        Raises:
            StaleReplicaError: they are not all there.
            MalformedMessageError: they take more than MOST_OF_A_MODEL.
        """
        found, total = list[PoolCoefficients](), 0
        for pool in map(self.pool, range(min(count, len(self._held)))):
            if pool is None:
                break
            found.append(pool)
            total += pool.nbytes
            if total > MOST_OF_A_MODEL:
                raise MalformedMessageError(
                    f"The first {len(found)} pools of the message take more than {MOST_OF_A_MODEL:,} bytes: raise pool_every.",
                    bytes=total,
                )
        if len(found) < count:
            raise StaleReplicaError(f"The message builds upon {count} pools; this client holds {len(found)} of them.")
        return found


_decoded = DecodedPools()


def worker(config: RunConfig) -> Worker:
    """The worker of this process for `config`."""
    return Worker(config)
