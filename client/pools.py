"""The pools that clients keep between rounds, in the memory of the worker: encoded, and decoded for the next use.

Flower's context carries the encoded ones too, but loses them when a SuperNode restarts. They are a cache: a message is built
upon the state whose digest it names, and pools that do not lead to it are dropped and asked for again. Both are bounded in
bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.coefficients import PoolCoefficients
    from fedtune.directions.base import Pool

MOST_CLIENTS = 256
MOST_BYTES = 256 << 20
MOST_OF_A_CLIENT = 64 << 20
"""Bytes of encoded pools that one client keeps, as many as a message may have on its way through the proxy."""
MOST_DECODED = 64 << 20
MOST_OF_A_MODEL = 1 << 30
"""Bytes of decoded coefficients that one model may be made of: two thousand pools of 16 blocks and K = 4096 at 24 bits."""


class KeptPools:
    """Pools by run and client; those that were used longest ago make room."""

    def __init__(self, most_clients: int = MOST_CLIENTS, most_bytes: int = MOST_BYTES) -> None:
        self._most_clients, self._most_bytes = most_clients, most_bytes
        self._kept: OrderedDict[tuple[str, str], list[bytes]] = OrderedDict()
        self._bytes = 0

    def of(self, run: str, client: str) -> list[bytes]:
        """The pools that `client` kept in `run`, [] if none."""
        return list(self._kept.get((run, client), ()))

    def keep(self, run: str, client: str, pools: list[bytes]) -> None:
        """Keep `pools` in place of those before."""
        self.drop(run, client)
        self._kept[run, client] = list(pools)
        self._bytes += sum(map(len, pools))
        while len(self._kept) > self._most_clients or self._bytes > self._most_bytes:
            self.drop(*next(iter(self._kept)))

    def drop(self, run: str, client: str) -> None:
        """Forget what `client` kept in `run`."""
        self._bytes -= sum(map(len, self._kept.pop((run, client), [])))


def leading(pools: Sequence[bytes], most: int = MOST_OF_A_CLIENT) -> list[bytes]:
    """The first of `pools` that have `most` bytes together; the server is asked for the others when they are needed."""
    kept, total = [], 0
    for pool in pools:
        total += len(pool)
        if total > most:
            break
        kept.append(pool)
    return kept


class DecodedPools:
    """Pools as they were decoded, by their bytes; those that were used longest ago make room."""

    def __init__(self, most_bytes: int = MOST_DECODED) -> None:
        self._most = most_bytes
        self._found: OrderedDict[tuple[bytes, Pool, int, int], PoolCoefficients] = OrderedDict()
        self.bytes = 0

    def of(
        self, data: bytes, pool: Pool, blocks: int, bits: int, decode: Callable[[bytes, Pool, int, int], PoolCoefficients]
    ) -> PoolCoefficients:
        """What `decode` makes of `data`. Raises what it raises."""
        key = (data, pool, blocks, bits)
        if key in self._found:
            self._found.move_to_end(key)
            return self._found[key]
        decoded = decode(*key)
        self._found[key] = decoded
        self.bytes += len(data) + decoded.nbytes
        while self.bytes > self._most:
            (oldest, *_), gone = self._found.popitem(last=False)
            self.bytes -= len(oldest) + gone.nbytes
        return decoded
