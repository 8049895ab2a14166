"""The part of a client that computes: it owns the model and the data, takes an instruction and returns an update.

Bytes in, bytes out, no Flower: the ClientApp calls it in this process (a simulation), or forwards to the long-lived
process of `service.py`, which offers the same two calls. One worker serves any number of clients, one after another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

from client.files import source_digest
from client.identity import Identity, Introduction
from client.pools import MOST_OF_A_MODEL, DecodedPools, leading
from fedtune import wire
from fedtune.algorithms.base import most_pools
from fedtune.coefficients import Coefficients, PoolCoefficients
from fedtune.config import RunConfig
from fedtune.data.encode import Encoded
from fedtune.data.federated import load_local
from fedtune.directions import Pool
from fedtune.errors import ConfigError, MalformedMessageError, MismatchError, StaleReplicaError, WireError
from fedtune.resident import Resident, resident
from fedtune.selftest import encode, self_test


class Worker:
    """Trains for clients of one run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def _resident(self) -> Resident:
        return resident(self.config)

    def introduce(self, identity: Identity) -> Introduction:
        """Load model and data, and say which base model, how many samples and which directions this client has."""
        replica = self._resident.replica
        examples = len(self._samples(identity))
        test = encode(self_test(self._pool(0), str(self._resident.language_model.device)))
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
        here, config = self._resident, self.config
        replica, algorithm = here.replica, here.algorithm
        blocks, bits = replica.layout.blocks, config.coefficient_bits
        kept = _Kept(held, self._pool, blocks, bits)
        most = partial(most_pools, config)
        instruction = wire.decode_instruction(message, self._pool, most, blocks, bits, kept.pool)
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
        replica.touch()
        work = here.work(identity.client, self._samples(identity), instruction.round, instruction.pools[-1].pool)
        update = algorithm.local_update(replace(work, deadline=deadline), config, instruction)
        differs = [pool for pool in instruction.pools if not pool.pool.disjoint]  # the others are never built upon
        keep = leading([*held[: instruction.held], *(wire.encode_pool(pool, bits) for pool in differs)])
        chosen = bool(instruction.counts.size)  # by the server, which knows them
        return wire.encode_update(update, config.scalar_bits, with_counts=not chosen), keep

    def _samples(self, identity: Identity) -> tuple[Encoded, ...]:
        if identity.data and self.config.algorithm == "central":
            raise ConfigError("algorithm = central trains on the data of all clients in one place: leave the node's data away.")
        if identity.data:
            return _own_file(self.config, identity.data, source_digest(identity.data))
        shares = self._resident.data.clients
        if identity.partition >= len(shares):
            raise ConfigError(
                f"This node is client {identity.partition} but the data is divided over {len(shares)}: "
                "set clients to the number of nodes, or give the node its own file with --node-config 'data=\"PATH\"'."
            )
        return tuple(self._resident.algorithm.samples(shares, identity.partition))

    def _pool(self, number: int) -> Pool:
        here = self._resident
        return here.algorithm.pool(self.config, here.replica.layout, number)


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


@lru_cache(maxsize=64)
def _own_file(config: RunConfig, path: str, digest: bytes) -> tuple[Encoded, ...]:
    return load_local(config, resident(config).language_model.tokenizer, path)


_decoded = DecodedPools()


def forget() -> None:
    """Drop the samples that were read from clients' own files: the tokenizer may have changed."""
    _own_file.cache_clear()


@lru_cache(maxsize=2)
def worker(config: RunConfig) -> Worker:
    """The worker of this process for `config`."""
    return Worker(config)
