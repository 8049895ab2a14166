"""The encoded pools that clients keep between rounds, in the memory of the worker.

Flower's context carries them too, but loses them when a SuperNode restarts. They are a cache: a message is built upon
the state whose digest it names, and pools that do not lead to it are dropped and asked for again.
"""

from __future__ import annotations

from collections import OrderedDict

MOST_CLIENTS = 256
MOST_BYTES = 256 << 20


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
