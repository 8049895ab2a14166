"""Clients that come late, miss rounds, or lose what they kept: one message brings them to the server's model, by digest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message

import client.app
from fedtune.config import RunConfig
from fedtune.resident import release
from simulations.engines.local_grid import Faults
from tests.laws.federation import config, payload_of, run, with_payload

METHODS = ("fedkseed", "fedkseed-pro", "fedkseed-fresh", "ferret", "ferret-fixed")
COMPLETE = 71 + 64  # bytes of an instruction with all of K = 64 coefficients of 8 bits in one block


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def build(method: str, out: str, **changes: object) -> RunConfig:
        return config(method, tiny_folder, instructions, tmp_path / out, **{"rounds": 10, "eval_every": 0, **changes})

    return build


@dataclass
class Node:
    """A ClientApp that does to one client's messages what a test says, and writes down the bytes of all.

    Attributes:
        client: partition id of that client.
        unwell: (round) -> whether the client is away, so that its message fails.
        deaf: whether it answers, when it is unwell, but with garbage: always there, and never of use.
        spoil: what happens to the client's memory before a round.
        sent: (round, partition id) -> payload bytes of each instruction, in order.
    """

    client: int = 1
    unwell: Callable[[int], bool] = lambda number: False
    deaf: bool = False
    spoil: Callable[[int, Context], None] = lambda number, context: None
    sent: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def __call__(self, message: Message, context: Context) -> Message:
        payload = payload_of(message)
        if payload is None:
            return client.app.app(message, context)
        number, partition = int(message.metadata.group_id), int(context.node_config["partition-id"])
        self.sent.setdefault((number, partition), []).append(len(payload))
        if partition != self.client:
            return client.app.app(message, context)
        self.spoil(number, context)
        if not self.unwell(number):
            return client.app.app(message, context)
        if not self.deaf:
            raise RuntimeError("not there")
        return with_payload(client.app.app(message, context), b"garbage")


@pytest.mark.parametrize("method", METHODS)
def test_who_comes_in_round_five_of_ten_is_as_who_was_always_there(settings: Callable[..., RunConfig], method: str) -> None:
    """The same schedule twice: client 1 follows every round and is of no use before round 5, or is not there before it."""
    always = Node(unwell=lambda number: number < 5, deaf=True)
    late = Node(unwell=lambda number: number < 5)
    first = run(settings(method, "first", clients_per_round=4), handler=always)
    release()
    second = run(settings(method, "second", clients_per_round=4), handler=late)
    assert second.digests == first.digests
    assert {key for key in second.refused} == {f"{number}/1" for number in range(1, 5)}
    assert first.summary["final_loss"] == second.summary["final_loss"]
    assert len(late.sent[5, 1]) == 1  # one message brings it up


@pytest.mark.parametrize("missed", [1, 4, 8])
def test_catching_up_costs_the_same_whatever_was_missed(settings: Callable[..., RunConfig], missed: int) -> None:
    node = Node(unwell=lambda number: 1 < number < missed + 2)
    outcome = run(settings("fedkseed", "run", clients_per_round=4), handler=node)
    assert f"{missed + 2}/1" not in outcome.refused
    assert len(node.sent[missed + 2, 1]) == 1
    assert node.sent[missed + 2, 1][0] <= COMPLETE
    assert max(size for sizes in node.sent.values() for size in sizes) <= COMPLETE


def test_who_was_there_a_round_ago_gets_less(settings: Callable[..., RunConfig]) -> None:
    node = Node(unwell=lambda number: number == 9)
    run(settings("fedkseed", "run", clients_per_round=4), handler=node)
    whole, less = node.sent[10, 1][0], node.sent[10, 2][0]
    assert less < 0.8 * whole
    sizes = [node.sent[number, 2][0] for number in range(1, 11)]
    assert max(sizes[4:]) < whole


def kept(context: Context) -> list[bytes]:
    pools = context.state.config_records["fedtune"]["pools"]
    assert isinstance(pools, list)
    return [bytes(pool) for pool in pools if isinstance(pool, bytes)]


def remember(context: Context, pools: list[bytes]) -> None:
    context.state.config_records["fedtune"] = ConfigRecord({"pools": pools})


def forget(number: int, context: Context) -> None:
    context.state.config_records.pop("fedtune", None)


def damage(number: int, context: Context) -> None:
    if number > 1:
        remember(context, [pool[:9] + b"\xff" * len(pool[9:]) for pool in kept(context)])


def cut(number: int, context: Context) -> None:
    if number > 1:
        remember(context, [pool[:-1] for pool in kept(context)])


class GoBack:
    """Every second round the client wakes with the memory that it had two rounds before."""

    def __init__(self) -> None:
        self.before: list[list[bytes]] = []

    def __call__(self, number: int, context: Context) -> None:
        if number > 1:
            self.before.append(kept(context))
        if number > 3 and number % 2:
            remember(context, self.before[-3])


SPOILT: dict[str, Callable[[], Callable[[int, Context], None]]] = {
    "nothing": lambda: forget, "other bits": lambda: damage, "a byte less": lambda: cut, "an older state": GoBack,
}  # fmt: skip


@pytest.mark.parametrize("method", ["fedkseed", "fedkseed-fresh", "ferret", "ferret-fixed"])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_memory_that_is_lost_or_wrong_is_never_trusted(settings: Callable[..., RunConfig], method: str, spoilt: str) -> None:
    """The client says so, gets everything in the same round, and the run ends where it would have ended."""
    asked = {"clients_per_round": 2, "clients": 2, "rounds": 6}
    expected = run(settings(method, "first", **asked))
    node = Node(spoil=SPOILT[spoilt]())
    outcome = run(settings(method, "second", **asked), handler=node)
    assert outcome.digests == expected.digests
    assert not outcome.refused
    assert max(len(node.sent[number, 1]) for number in range(1, 7)) == 2  # asked again, with everything
    assert all(len(node.sent[number, 0]) == 1 for number in range(1, 7))


def test_a_message_for_another_model_is_refused_and_not_asked_for_again(settings: Callable[..., RunConfig]) -> None:
    """Where nothing that the client kept is to blame."""
    asked: list[int] = []

    def tamper(message: Message, reply: Message) -> Message:
        asked.append(message.metadata.dst_node_id)
        return reply

    def handler(message: Message, context: Context) -> Message:
        payload = payload_of(message)
        if payload is not None and int(context.node_config["partition-id"]) == 1:
            message = with_payload(message, payload[:40] + b"?" * 16 + payload[56:])
        return client.app.app(message, context)

    outcome = run(settings("fedkseed", "run", rounds=1, clients_per_round=4), Faults(tamper=tamper), handler)
    assert "MismatchError: The coefficients do not lead to the model" in outcome.refused["1/1"]
    assert len(asked) == 8
