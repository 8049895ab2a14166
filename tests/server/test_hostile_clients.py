"""One hostile client of several, over a whole run: it is refused by name, and the others go on."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

import client.app
import server.app
from fedtune import errors, wire
from fedtune.config import RunConfig
from fedtune.errors import FedtuneError, Interrupted, RunError
from fedtune.layout import Layout
from fedtune.ledger import Ledger
from fedtune.progress import Event, Note, listening
from fedtune.replay import Rules
from fedtune.selftest import encode, self_test
from fedtune.verify import verify
from server.exchange import NOT_SENT
from server.nodes import Node
from server.strategy import CoefficientStrategy
from simulations.engines import flower_internals as internals
from simulations.engines.local_grid import Faults, LocalGrid
from tests.laws.federation import Outcome, config, lying, payload_of, run, with_payload
from tests.server.test_roster import FIELDS, VALUES
from tests.test_ledger import SHAPES

STEPS, EXAMPLES, LOSS = slice(25, 29), slice(29, 33), slice(33, 37)  # in an update (docs/wire.md)


@pytest.fixture
def asked(tiny_folder: Path, instructions: Path, tmp_path: Path) -> RunConfig:
    quick = {"rounds": 2, "clients_per_round": 3, "eval_every": 0, "eval_samples": 4, "local_steps": 2}
    return config("fedkseed", tiny_folder, instructions, tmp_path / "run", **quick)


def saying(kind: str, fields: Callable[[ConfigRecord], dict[str, object]]) -> Faults:
    """Client 1's node says something else than its record, when it is asked for a "query" or to "train"."""

    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type != kind or message.metadata.dst_node_id != second[0]:
            return reply
        said = fields(reply.content.config_records["fedtune"])
        changed = Message(RecordDict({"fedtune": ConfigRecord(said)}), reply_to=reply)  # type: ignore[arg-type]
        changed.metadata.__dict__.update(reply.metadata.__dict__)
        return changed

    second = [LocalGrid(lambda message, context: message, 4, {}, seed=11).get_node_ids()[1]]
    return Faults(tamper=tamper)


def refused_everywhere(outcome: Outcome) -> set[str]:
    with Ledger.open(outcome.folder.path) as ledger:
        verify(ledger)
    return {key.partition("/")[2] for key in outcome.refused}


LIES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "samples": (
        lambda p: p[: EXAMPLES.start] + b"\xff" * 4 + p[EXAMPLES.stop :],
        "MismatchError: It speaks of 4294967295 samples; the client introduced itself with ",
    ),
    "loss": (
        lambda p: p[: LOSS.start] + struct.pack("<f", 3e38) + p[LOSS.stop :],
        "MalformedMessageError: The training loss is 3e+38: 0 to 1,000,000 nats were expected",
    ),
    "a loss below zero": (
        lambda p: p[: LOSS.start] + struct.pack("<f", -1.0) + p[LOSS.stop :],
        "MalformedMessageError: The training loss is -1: 0 to",
    ),
    "no steps": (
        lambda p: p[: STEPS.start] + bytes(4) + p[STEPS.stop : 37],
        "MalformedMessageError: The update has no steps.",
    ),
    "megabytes": (lambda p: p + bytes(30_000_000), "MalformedMessageError: The update has 30000041 bytes; at most 41 were"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_client_cannot_have_done_is_refused_by_name(asked: RunConfig, lie: str) -> None:
    change, text = LIES[lie]
    outcome = run(asked, lying(change)[0])
    assert len(refused_everywhere(outcome)) == 1
    assert all(reason.startswith(text) for reason in outcome.refused.values())
    assert len(set(outcome.digests)) == 3  # the others count


def test_a_client_whose_samples_changed_is_asked_again_and_counts_from_then_on(asked: RunConfig) -> None:
    """As when the file of a node is exchanged between two rounds, with the node's restart unnoticed."""
    once: list[int] = []

    def before(record: ConfigRecord) -> dict[str, object]:
        once.append(1)
        return {**record, "examples": int(str(record["examples"])) + (5 if len(once) == 1 else 0)}

    outcome = run(asked.replace(clients_per_round=4), saying("query", before))
    assert list(outcome.refused) == ["1/1"]
    assert len(once) == 2


@pytest.mark.parametrize("name", ["Interrupted", "KeyboardInterrupt", "annotations", "__doc__", "RunError", "DivergedError"])
def test_no_client_stops_the_server_with_the_name_of_an_error(asked: RunConfig, name: str) -> None:
    for kind in ("query", "train"):
        out = f"{asked.out}-{kind}"
        outcome = run(asked.replace(out=out, clients_per_round=3), saying(kind, lambda record: {"problem": name, "text": "x"}))
        assert all(reason == "FedtuneError: x" for reason in outcome.refused.values())
        assert outcome.summary["rounds"] == 2
    needed = asked.replace(out=f"{asked.out}-needed", clients_per_round=4)
    with pytest.raises(FedtuneError, match="Node 1 was refused: x") as caught:
        run(needed, saying("query", lambda record: {"problem": name, "text": "x"}))
    assert not isinstance(caught.value, Interrupted | RunError)


def test_only_errors_of_a_clients_own_work_keep_their_type() -> None:
    assert errors.named("Interrupted") is Interrupted
    assert errors.reported("DataError") is errors.DataError
    assert errors.reported("no such") is FedtuneError
    for name, kind in errors.KINDS.items():
        assert errors.reported(name) is (FedtuneError if issubclass(kind, RunError) else kind)


# ---------------------------------------------------------------------------------------------------- disk


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize("text", ["x " * (8 << 20), "\x1b" * (1 << 20), "\U000e0001" * (1 << 20)], ids=["long", "ESC", "tags"])
def test_what_a_client_says_takes_a_few_kilobytes_of_disk(asked: RunConfig, text: str) -> None:
    """16 MiB of error text made 134 MB of files in two rounds."""
    usual = run(asked.replace(out=f"{asked.out}-usual"))
    for kind in ("query", "train"):
        problem = {"problem": "DataError", "text": text}
        outcome = run(asked.replace(out=f"{asked.out}-{kind}"), saying(kind, lambda record, problem=problem: problem))
        assert size_of(outcome.folder.path) - size_of(usual.folder.path) < 160_000  # of two rounds, some copies each
        assert all(len(reason) < 4100 for reason in outcome.refused.values())


def test_an_id_of_megabytes_is_not_stored(asked: RunConfig) -> None:
    outcome = run(asked, saying("query", lambda record: {**record, "client": "x" * 5_000_000}))
    assert size_of(outcome.folder.path) < 300_000


# ---------------------------------------------------------------------------------------------------- ids over a run


def test_a_node_that_comes_back_under_another_id_leaves_a_ledger_that_can_be_verified(asked: RunConfig) -> None:
    """Both ids were of one node, one of its two answers was ignored every round, and `ledger verify` failed for ever."""
    longer = asked.replace(rounds=6, clients_per_round=4)
    grid = LocalGrid(client.app.app, 4, longer.as_mapping())
    node, polls = next(iter(grid.nodes)), [0]
    everybody = grid.get_node_ids

    def away_once() -> list[int]:
        polls[0] += 1
        if polls[0] != 4:
            return everybody()
        grid.contexts[node].node_config["client-id"] = "renamed"
        return [other for other in everybody() if other != node]

    grid.get_node_ids = away_once  # type: ignore[method-assign]
    notes: list[str] = []
    with listening(lambda event: notes.append(event.text) if isinstance(event, Note) else None):
        server.app.app(grid, grid.server_context())
    with Ledger.open(Path(longer.out)) as ledger:
        assert verify(ledger).rounds == 6
        assert ledger.round(6).clients == ("1", "2", "3", "renamed")
        assert ledger.round(6).refused == {}
        keys = [dict(event.detail["keys"]) for event in ledger.events("keys")]
    assert "Client 0 calls itself renamed now: nobody is asked as 0 any more." in notes
    assert keys[1]["renamed"] == keys[0]["0"]


def test_an_id_stays_with_its_key_over_a_resume(asked: RunConfig) -> None:
    """Node 0 was client "hospital"; when it is away, node 1 says that it is."""
    whole = asked.replace(clients_per_round=4, rounds=1)
    grid = LocalGrid(client.app.app, 4, whole.as_mapping(), node_configs={0: {"client-id": "hospital"}})
    server.app.app(grid, grid.server_context())
    resumed = whole.replace(rounds=2, clients_per_round=2, min_clients=2, resume=whole.out)
    grid = LocalGrid(client.app.app, 4, resumed.as_mapping(), node_configs={1: {"client-id": "hospital"}})
    there = grid.get_node_ids()[1:]
    grid.get_node_ids = lambda: there  # type: ignore[method-assign]
    notes: list[str] = []
    with listening(lambda event: notes.append(event.text) if isinstance(event, Note) else None):
        server.app.app(grid, grid.server_context())
    assert any("Client hospital was refused: client id 'hospital' belongs to the key" in note for note in notes)
    with Ledger.open(Path(whole.out)) as ledger:
        assert set(ledger.round(2).clients) == {"2", "3"}
        assert verify(ledger).rounds == 2


def test_a_late_answer_to_a_closed_round_is_not_the_next_rounds(asked: RunConfig) -> None:
    """The first client's answer to round 1 is given once more in place of its answer to round 2."""
    kept: dict[int, Message] = {}

    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type != "train":
            return reply
        first = kept.setdefault(message.metadata.dst_node_id, reply)
        return first if message.metadata.group_id == "2" else reply

    outcome = run(asked.replace(round_timeout=0.5, clients_per_round=4), Faults(tamper=tamper))
    assert {key for key in outcome.refused} == {f"2/{client}" for client in range(4)}
    assert outcome.digests[1] == outcome.digests[2]
    refused_everywhere(outcome)


def test_who_does_not_say_who_it_is_is_not_asked_again_and_again(asked: RunConfig) -> None:
    """Client 1 sends what another one measured in every round, and does not answer the question that this leads to."""
    questions: list[int] = []
    second = LocalGrid(client.app.app, 4, {}, seed=asked.seed).get_node_ids()[1]

    def drop(message: Message) -> bool:
        questions.extend([1] if message.metadata.message_type == "query" and message.metadata.dst_node_id == second else [])
        return len(questions) > 1 and message.metadata.message_type == "query"

    def tamper(message: Message, reply: Message) -> Message:
        payload = payload_of(reply)
        wrong = payload is not None and message.metadata.dst_node_id == second
        return with_payload(reply, payload[:8] + b"?" * 16 + payload[24:]) if wrong and payload else reply

    outcome = run(asked.replace(rounds=6, clients_per_round=4), Faults(drop=drop, tamper=tamper))
    assert set(outcome.refused) == {f"{number}/1" for number in range(1, 7)}
    assert len(questions) == 2


class Deaf(LocalGrid):
    """Takes no training message for its first two nodes, as Flower where one is too large."""

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:  # type: ignore[override]
        deaf, ids = self.get_node_ids()[:2], []
        for message in messages:
            refused = message.metadata.message_type == "train" and message.metadata.dst_node_id in deaf
            ids += [None] if refused else super().push_messages([message])
        return ids


def test_clients_to_whom_nothing_could_be_sent_are_named(asked: RunConfig) -> None:
    grid = Deaf(client.app.app, 4, asked.as_mapping())
    server.app.app(grid, grid.server_context())
    with Ledger.open(Path(asked.out)) as ledger:
        assert verify(ledger).rounds == 2
        assert {reason for row in ledger.rounds() for reason in row.refused.values()} == {NOT_SENT}


# ---------------------------------------------------------------------------------------------------- anything at all


def begun() -> tuple[CoefficientStrategy, list[Message]]:
    """A strategy without a model whose first round has asked clients 0 and 1."""
    internals.adopt_identity(1)
    settings = RunConfig(K=64, local_steps=2, clients=2, clients_per_round=2)
    rules = Rules(settings, Layout.from_shapes(SHAPES, "one"), b"f" * 16)
    strategy = CoefficientStrategy(rules, rules.start())
    test = encode(self_test(rules.algorithm.pool(settings, rules.layout, 0)))
    nodes = {number + 2: Node(number + 2) for number in range(2)}
    questions = strategy.configure_introduction(nodes)
    replies = []
    for number, question in enumerate(questions):
        internals.give_id(question, f"q{number}")
        fields = {
            "client": str(number),
            "examples": 5,
            "fingerprint": b"f" * 16,
            "layout": rules.layout.digest,
            "selftest": test,
        }
        replies.append(Message(RecordDict({"fedtune": ConfigRecord(fields)}), reply_to=question))
    asked = {question.metadata.message_id: nodes[question.metadata.dst_node_id] for question in questions}
    assert strategy.roster.accept(asked, replies, nodes) == []
    instructions = strategy.configure_train(1, None, ConfigRecord(), None)  # type: ignore[arg-type]
    for number, message in enumerate(instructions):
        internals.give_id(message, f"m{number}")
    strategy.note_sent(instructions)
    return strategy, instructions


def honest(strategy: CoefficientStrategy, client: str) -> bytes:
    scalars, none = np.ones(2, np.float32), np.zeros(0, np.int64)
    update = wire.Update(1, strategy.digest, wire.Status.FINISHED, 2, 5, 1.0, scalars, none)
    return wire.encode_update(update, 16, client=client)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(FIELDS, VALUES, max_size=5), st.booleans())
def test_whatever_a_reply_holds_it_is_refused_by_name_and_the_others_count(fields: dict[str, object], known: bool) -> None:
    strategy, (first, second) = begun()
    if known:
        fields = {"problem": "StaleReplicaError", **fields}
    hostile = Message(RecordDict({"fedtune": ConfigRecord(fields)}), reply_to=first)  # type: ignore[arg-type]
    good = Message(RecordDict({"fedtune": ConfigRecord({"payload": honest(strategy, "1")})}), reply_to=second)
    events: list[Event] = []
    with listening(events.append):
        strategy.aggregate_train(1, [hostile, good, hostile])
    tally = strategy.tally
    assert list(tally.refused) == ["0"]
    assert len(tally.refused["0"]) < 4100
    assert list(tally.updates) == list(tally.payloads) == ["1"]
    assert not tally.short
    assert [event.text for event in events if isinstance(event, Note)] == ["A reply that nobody asked for was ignored."]


def test_two_answers_of_a_client_count_once() -> None:
    strategy, (first, _) = begun()
    record = ConfigRecord({"payload": honest(strategy, "0")})
    replies = [Message(RecordDict({"fedtune": record}), reply_to=first) for _ in range(2)]
    strategy.aggregate_train(1, replies)
    assert list(strategy.tally.updates) == ["0"]
    assert strategy.tally.refused == {"1": "no answer"}
