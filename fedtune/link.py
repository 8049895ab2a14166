"""A run on a simulated link: how long its messages take where bandwidth and latency are given, and not this machine's.

    seconds = bytes down * 8 / (down_mbit * 10^6) + bytes up * 8 / (up_mbit * 10^6) + round trips * latency_ms / 1000

of one client in one round. A round takes as long as its slowest client; rounds follow one another. Two levels:

payload   payload bytes, and one round trip for each message: what no protocol can undercut
wire      `fedtune.overheads.wire_estimate`, and Flower's requests one after another (it does a few at the same time)

Neither has the seconds that a SuperNode waits before it asks again (3 at most), TCP's slow start, nor losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Self

from fedtune.errors import ConfigError, RunFolderError
from fedtune.overheads import ANSWER, INSTRUCTION, wire_estimate
from fedtune.seeds import Stream
from fedtune.traffic import Traffic, from_lists

Level = Literal["payload", "wire"]
MEGABIT = 1e6  # bits


@dataclass(frozen=True)
class Link:
    """One client's way to the server.

    Attributes:
        name: what it is called.
        down_mbit, up_mbit: 10^6 bits a second from the server and to it.
        latency_ms: of a round trip, in milliseconds.

    Raises:
        ConfigError: a bandwidth that is not above 0, a latency below 0, or a number that is not finite.
    """

    name: str
    down_mbit: float
    up_mbit: float
    latency_ms: float

    def __post_init__(self) -> None:
        numbers = {"down": self.down_mbit, "up": self.up_mbit, "latency": self.latency_ms}
        if not all(map(math.isfinite, numbers.values())) or min(self.down_mbit, self.up_mbit) <= 0 or self.latency_ms < 0:
            said = ",".join(f"{key}={value:g}" for key, value in numbers.items())
            raise ConfigError(
                f"A link has down and up above 0 (Mbit/s) and a latency of at least 0 (ms), not {said}.", link=said
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """A link of LINKS by its name, or one of "down=20,up=5,latency=40" (Mbit/s, Mbit/s, ms of a round trip).

        >>> Link.parse("down=20,up=5,latency=40")
        Link(name='down=20,up=5,latency=40', down_mbit=20.0, up_mbit=5.0, latency_ms=40.0)

        Raises:
            ConfigError: neither.
        """
        if text in LINKS:
            known = LINKS[text]
            return cls(known.name, known.down_mbit, known.up_mbit, known.latency_ms)
        parts = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(","))
        try:
            down, up, latency = (float(parts.pop(key)) for key in ("down", "up", "latency"))
        except (KeyError, ValueError):
            parts = {"": text}
        if parts:
            raise ConfigError(f"'{text}' is no link: give one of {', '.join(LINKS)}, or down=20,up=5,latency=40.", link=text)
        return cls(text, down, up, latency)


# Round assumptions, each of the order of what such a link gives, not measurements of any: iot is of the class of NB-IoT, for
# whose second release 3GPP states peaks of 127 kbit/s down and 159 kbit/s up and which answers in seconds.
LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link("lan", down_mbit=1000, up_mbit=1000, latency_ms=1),
        Link("fibre", down_mbit=100, up_mbit=100, latency_ms=10),
        Link("dsl", down_mbit=16, up_mbit=2, latency_ms=40),
        Link("4g", down_mbit=20, up_mbit=5, latency_ms=60),
        Link("iot", down_mbit=0.1, up_mbit=0.1, latency_ms=2000),
    )
}
Links = Link | Mapping[str, Link]
"""One for all clients, or one for each by its id."""


def assigned(links: Sequence[Link], clients: Sequence[str], *, seed: int) -> dict[str, Link]:
    """One of `links` for each client, each as likely, from the stream (seed, "link", client): always the same one."""
    return {client: links[int(Stream(seed, "link", client).below(len(links), 1)[0])] for client in clients}


def client_seconds(link: Link, traffic: Traffic, level: Level = "wire") -> float:
    """What the messages `traffic` of one client and round take on its link (formula at the top of this file)."""
    if level == "payload":
        up, down, trips = traffic.payload_up, traffic.payload_down, traffic.messages_up + traffic.messages_down
    else:
        up, down = wire_estimate(traffic)
        trips = traffic.messages_down * INSTRUCTION.requests + traffic.messages_up * ANSWER.requests
    sent = 8 * down / (link.down_mbit * MEGABIT) + 8 * up / (link.up_mbit * MEGABIT)
    return sent + trips * link.latency_ms / 1000


def round_seconds(links: Links, traffic: Mapping[str, Traffic], level: Level = "wire") -> float:
    """Of a round: its slowest client's, 0 without clients. Raises ConfigError for a client without a link."""
    return max((client_seconds(_of(links, client), sent, level) for client, sent in traffic.items()), default=0.0)


def link_seconds(rows: Sequence[Mapping[str, Any]], links: Links, level: Level = "wire") -> list[float]:
    """Seconds of communication from the start to the end of each round, for the rows of metrics.jsonl (round 0 has none).

    Only communication: no local step, no evaluation. `link_and_work_seconds` has both.

    Raises:
        ConfigError: a client has no link. RunFolderError: a row does not say who sent what (a run of an older version).
    """
    return list(accumulate(round_seconds(links, _traffic(row), level) for row in rows))


def link_and_work_seconds(rows: Sequence[Mapping[str, Any]], links: Links, level: Level = "wire") -> list[float]:
    """As `link_seconds`, and with the seconds that this machine worked in each round (`seconds`, all phases).

    In one process the clients of a round work one after another, so a run of c clients a round counts the local steps of all c.
    """
    worked = accumulate(sum(float(phase or 0) for phase in (row.get("seconds") or {}).values()) for row in rows)
    return [sent + work for sent, work in zip(link_seconds(rows, links, level), worked, strict=True)]


def _of(links: Links, client: str) -> Link:
    if isinstance(links, Link):
        return links
    if client not in links:
        raise ConfigError(f"Client {client} has no link: links were given for {', '.join(sorted(links))}.", client=client)
    return links[client]


def _traffic(row: Mapping[str, Any]) -> dict[str, Traffic]:
    lists = row.get("traffic")
    if lists is None:
        raise RunFolderError(f"Round {row.get('round')} does not say what each client sent: the run is of an older fedtune.")
    return from_lists(lists)
