"""Which bytes on the wire belong to what: connecting, the app bundle, the introduction, a round, or polling.

A proxy saw requests and their answers; the run folder's log says when each round began. What looks like a request of the time
when there was nothing to do is polling; the rest belongs to the round in which it began. Every byte is in exactly one part.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from simulations.proxy import Exchange

# Bytes by which requests of one kind differ, up and down: the signature in their headers has several lengths, and with TLS,
# where requests have no names, one may carry the 24 bytes by which a connection ends. Others differ by 40 or more.
NEAR, NEAR_TLS = (8, 4), (32, 32)


class Bytes(NamedTuple):
    """Up to the server, down from it."""

    up: int = 0
    down: int = 0


@dataclass(frozen=True)
class Times:
    """Moments of a measurement, seconds since 1970.

    Attributes:
        idle, submitted: begin and end of the time in which nodes were connected and had nothing to do.
        rounds: begin of each round, from 1.
    """

    idle: float
    submitted: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class Parts:
    """What passed between one SuperNode and the SuperLink.

    Attributes:
        connect: until the idle time began: registering, activating, the first polls, and the handshake of TLS.
        polling: asking for work in vain, and signs of life, from then on.
        bundle: the transfer of the app bundle.
        introduction: the rest until the first round: the run's settings, the server's question and the answer.
        rounds: by number, what is not polling.
        idle_minute: polling of a minute without work.
    """

    connect: Bytes
    polling: Bytes
    bundle: Bytes
    introduction: Bytes
    rounds: Mapping[int, Bytes]
    idle_minute: Bytes = field(default_factory=Bytes)

    @property
    def total(self) -> Bytes:
        """Of all parts: what the proxy counted."""
        return add([self.connect, self.polling, self.bundle, self.introduction, *self.rounds.values()])


def add(parts: Iterable[Bytes]) -> Bytes:
    """The sum, by direction."""
    pairs = list(parts)
    return Bytes(sum(pair.up for pair in pairs), sum(pair.down for pair in pairs))


def attribute(exchanges: Sequence[Exchange], times: Times, bundle: int) -> Parts:
    """Divide what one client exchanged.

    Args:
        exchanges: all of them.
        times: of the measurement.
        bundle: bytes of the app bundle: the only answer before the first round that is as long.
    """
    before = [exchange for exchange in exchanges if exchange.began < times.submitted]
    found: dict[str | int, list[Bytes]] = {"connect": [], "polling": [], "bundle": [], 0: []}
    found |= {number: [] for number in range(1, len(times.rounds) + 1)}
    for exchange in exchanges:
        found[_part(exchange, before, times, bundle)].append(Bytes(exchange.up, exchange.down))
    idle = [Bytes(one.up, one.down) for one in before if one.began >= times.idle]
    return Parts(
        connect=add(found["connect"]),
        polling=add(found["polling"]),
        bundle=add(found["bundle"]),
        introduction=add(found[0]),
        rounds={number: add(found[number]) for number in range(1, len(times.rounds) + 1)},
        idle_minute=_each_minute(add(idle), times.submitted - times.idle),
    )


def _part(exchange: Exchange, before: Sequence[Exchange], times: Times, bundle: int) -> str | int:
    """Name of the part, or number of the round, 0 for the introduction."""
    if exchange.began < times.idle:
        return "connect"
    if any(_alike(exchange, other) for other in before):
        return "polling"
    number = bisect_right(times.rounds, exchange.began)
    return "bundle" if number == 0 and exchange.down >= bundle else number


def _alike(one: Exchange, other: Exchange) -> bool:
    up, down = NEAR if one.call else NEAR_TLS
    return one.call == other.call and abs(one.up - other.up) <= up and abs(one.down - other.down) <= down


def _each_minute(amount: Bytes, seconds: float) -> Bytes:
    return Bytes(*(round(60 * count / seconds) for count in amount)) if seconds > 0 else Bytes()


def round_starts(log: Path) -> tuple[float, ...]:
    """When each round began, from the log.jsonl of a run folder; of a round that was asked again, the first time."""
    starts: dict[int, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "RoundStarted":
            starts.setdefault(int(event["round"]), datetime.fromisoformat(event["time"]).timestamp())
    return tuple(starts[number] for number in sorted(starts))
