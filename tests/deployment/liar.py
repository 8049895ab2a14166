"""`python liar.py ADDRESS DEVICE`: a node's worker that trains as it should and then answers with something else.

What it answers in which round is in LIES. A SuperNode with worker = ADDRESS forwards to it, so its lies take the way of every
honest answer: ClientApp, SuperNode, TLS, proxy, SuperLink, ServerApp.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from client.address import Address
from client.identity import Identity
from client.service import serve
from client.worker import Worker

_ROUND = slice(4, 8)  # in every message (docs/wire.md)
Lie = Callable[[bytes, Mapping[int, bytes]], bytes]
"""The honest answer, and those that were computed or sent in earlier rounds -> what is sent."""


def not_a_number(payload: bytes, _: Mapping[int, bytes]) -> bytes:
    """The last scalar is NaN, in 16 bits."""
    return payload[:-2] + np.array([0x7FC0], dtype="<u2").tobytes()


def of_round_one(payload: bytes, _: Mapping[int, bytes]) -> bytes:
    """Computed for this round, and says that it is for the first."""
    return payload[:4] + (1).to_bytes(4, "little") + payload[8:]


LIES: dict[int, Lie] = {
    1: lambda payload, sent: b"garbage",
    2: not_a_number,
    3: lambda payload, sent: payload[:-1],
    4: lambda payload, sent: payload + b"\0",
    5: of_round_one,
    6: lambda payload, sent: sent[5],  # the very bytes that it sent in the round before
}
REASONS = {
    1: "MalformedMessageError",
    2: "NonFiniteError",
    3: "MalformedMessageError",
    4: "MalformedMessageError",
    5: "MismatchError: The update is for round 1; this is round 5",
    6: "MismatchError: The update is for round 1; this is round 6",
}


def main() -> None:
    """Serve at the address until this is told to stop."""
    honest, sent = Worker.train, dict[int, bytes]()

    def lie(
        self: Worker, identity: Identity, message: bytes, held: Sequence[bytes], seconds: float = math.inf
    ) -> tuple[bytes, list[bytes]]:
        payload, keep = honest(self, identity, message, held, seconds)
        number = int.from_bytes(message[_ROUND], "little")
        sent[number] = LIES[number](payload, sent) if number in LIES else payload
        return sent[number], keep

    Worker.train = lie  # type: ignore[method-assign]
    serve(Address.parse(sys.argv[1]), sys.argv[2], 0.0)


if __name__ == "__main__":
    main()
