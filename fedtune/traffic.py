"""What a client's messages of a round weigh, at the two levels that a server can count; the third is on the wire.

payload      the bytes that fedtune makes and reads (docs/wire.md), counted where a message is made or read
serialised   the whole Flower message as protobuf, payload and metadata
wire         with TLS, HTTP headers and polling: counted by a proxy between SuperNode and SuperLink
             (`python -m simulations.wire`)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes and messages of one client: up to the server, down to the client."""

    payload_up: int = 0
    payload_down: int = 0
    serialised_up: int = 0
    serialised_down: int = 0
    messages_up: int = 0
    messages_down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))


def total(traffic: Iterable[Traffic]) -> Traffic:
    """The sum."""
    return sum(traffic, start=Traffic())


def merged(one: Mapping[str, Traffic], other: Mapping[str, Traffic]) -> dict[str, Traffic]:
    """By client: the sum of both."""
    return {client: one.get(client, Traffic()) + other.get(client, Traffic()) for client in sorted({*one, *other})}


def as_lists(traffic: Mapping[str, Traffic]) -> dict[str, list[int]]:
    """For JSON: by client, the six numbers in the order of the fields."""
    return {client: list(astuple(traffic[client])) for client in sorted(traffic)}


def from_lists(lists: Mapping[str, Iterable[int]]) -> dict[str, Traffic]:
    """The inverse of `as_lists`. Raises TypeError for another number of numbers."""
    return {client: Traffic(*(int(number) for number in numbers)) for client, numbers in lists.items()}
