"""Bytes on the wire without a proxy: what a message weighs when serialised, and what Flower adds to move it.

A SuperNode fetches an instruction with five HTTP requests (ask, three objects, confirm) and hands in an answer with four
(announce, three objects), each with headers of 840 bytes up and 130 down. The sums of both constants, 8,917 up and 2,007
down, are the means of a measurement with Flower 1.41 over plain HTTP, two clients and three rounds (`python -m
simulations.wire headline`; docs/bytes.md has the whole command and the figures); how they divide is seen from the requests.
They do not depend on the size of a message. Not in them: TLS, polling while there is nothing to do, and TCP's own headers.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.traffic import Traffic


@dataclass(frozen=True)
class Overhead:
    """What moving one message adds to its serialised bytes: up and down, and the requests, each after the one before."""

    up: int
    down: int
    requests: int


INSTRUCTION = Overhead(up=4574, down=1177, requests=5)
ANSWER = Overhead(up=4343, down=830, requests=4)


def wire_estimate(traffic: Traffic) -> tuple[int, int]:
    """(bytes up, bytes down) on the wire, estimated from what was serialised and how many messages carried it.

    >>> wire_estimate(Traffic(serialised_up=468, serialised_down=839, messages_up=1, messages_down=1))
    (9385, 2846)
    """
    sent, answered = traffic.messages_down, traffic.messages_up
    up = traffic.serialised_up + sent * INSTRUCTION.up + answered * ANSWER.up
    down = traffic.serialised_down + sent * INSTRUCTION.down + answered * ANSWER.down
    return up, down
