"""The Flower Strategy: it turns a state into messages and replies into the next state. Thin: the method is in fedtune.

It keeps the state of the run, remembers what every client already holds, refuses what must not be used (named and
counted), and measures payload bytes where messages are made.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedtune import errors, wire
from fedtune.algorithms import State
from fedtune.coefficients import Coefficients, PoolCoefficients, quantise
from fedtune.config import RunConfig
from fedtune.errors import FedtuneError, NonFiniteError, WireError
from fedtune.progress import ClientFinished, Note, RoundStarted, emit
from fedtune.redact import redact
from fedtune.replay import Rules, read_update
from fedtune.selftest import SelfTest, self_test
from fedtune.traffic import Traffic
from fedtune.wire import Instruction, Status, Update
from server.admission import check_fit
from server.sampling import natural_order, sample_clients

RECORD = "fedtune"  # name of the one ConfigRecord in every message
WAY_SHARE, LONGEST_WAY = 0.1, 30.0  # of round_timeout, in seconds: for the messages, the last step and the projection


@dataclass
class Client:
    """What the server knows about a client: Flower's node id, number of samples, pools that it holds.

    `known` is what it has of the pool after those: that of the instruction which it answered last. None: perhaps nothing.
    """

    node: int
    examples: int
    pools_held: int = 0
    known: PoolCoefficients | None = None


@dataclass
class Tally:
    """What happened in a round.

    Attributes:
        clients: those that were asked; `refused` has the reason for each whose update was not used.
        problems: the errors among those reasons that a client answered with.
        updates, payloads: of the others, as read and as received.
        short: too few updates were usable, so none was used.
        traffic: bytes and messages by client.
    """

    clients: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    problems: dict[str, FedtuneError] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)
    short: bool = False
    traffic: dict[str, Traffic] = field(default_factory=dict)
    train_loss: float = math.nan

    def count(self, client: str, traffic: Traffic) -> None:
        """Add to what the client's messages of this round weigh."""
        self.traffic[client] = self.traffic.get(client, Traffic()) + traffic


class CoefficientStrategy(Strategy):
    """Federated training in which the state is a few thousand coefficients.

    Args:
        rules: settings, algorithm, layout and fingerprint of the base model.
        state: to go on from.
        dropped: ids of clients that take no part.
    """

    def __init__(self, rules: Rules, state: State, dropped: Iterable[str] = ()) -> None:
        self.rules, self.config, self.algorithm = rules, rules.config, rules.algorithm
        self.layout, self.fingerprint = rules.layout, rules.fingerprint
        self.state = state
        self.clients: dict[str, Client] = {}
        self.dropped = set(dropped)
        self.tally = Tally()
        self._model = self.state.published(self.config.coefficient_bits)
        self._digest = self._model.digest(self.fingerprint)
        self._asked: dict[str, str] = {}

    @cached_property
    def _tested(self) -> SelfTest:
        return self_test(self.algorithm.pool(self.config, self.layout, 0))

    @property
    def model(self) -> Coefficients:
        """The model of the current state."""
        return self._model

    @property
    def digest(self) -> bytes:
        """16 bytes that name the current model."""
        return self._digest

    # ------------------------------------------------------------------ who takes part

    def configure_introduction(self, nodes: Iterable[int]) -> list[Message]:
        """One question to every node."""
        empty = RecordDict({RECORD: ConfigRecord({"round": 0})})
        return [
            Message(empty, dst_node_id=node, message_type=MessageType.QUERY, ttl=self.config.wait_timeout)
            for node in sorted(nodes)
        ]

    def accept_introductions(
        self, node_of: Mapping[str, int], replies: Iterable[Message], connected: Collection[int]
    ) -> list[FedtuneError]:
        """Keep the clients that train the same base model; report the others, and return their problems.

        Args:
            node_of: node of every question, by message id.
            replies: to them.
            connected: nodes that are connected now. A client whose node is not among them may come back as another node.
        """
        problems: list[FedtuneError] = []
        for reply in sorted(replies, key=lambda message: node_of.get(_answers(message), 0)):
            node = node_of.get(_answers(reply))
            try:
                if node is not None:
                    self._accept(node, _content(reply), connected)
            except FedtuneError as problem:
                problems.append(problem)
                emit(Note(f"A client was refused: {problem}", warning=True))
        return problems

    def check_enough(self, asked: int, problems: Sequence[FedtuneError]) -> None:
        """Raise the first client's problem if fewer clients remain, of the `asked` nodes, than the first round needs."""
        needed = min(1 if self.config.alone else self.config.asked_per_round, self.wanted)
        if len(self.clients) < needed:
            raise (
                problems[0]
                if problems
                else errors.RunError(
                    f"Only {len(self.clients)} of {asked} nodes introduced themselves; a round asks "
                    f"{needed}. Start more nodes, or lower clients_per_round."
                )
            )

    @property
    def wanted(self) -> int:
        """Nodes without which the run does not start."""
        return (self.config.min_clients or self.config.clients) - len(self.dropped)

    def _accept(self, node: int, record: ConfigRecord, connected: Collection[int]) -> None:
        client, examples = record.get("client"), record.get("examples")
        if not isinstance(client, str) or not isinstance(examples, int) or examples < 1:
            raise WireError("A node introduced itself without a client id or without samples.")
        check_fit(client, record, self.fingerprint, self.layout.digest, self._tested)
        if client in self.dropped:
            emit(Note(f"Client {client} was dropped from the run and takes no part."))
            return
        before = self.clients[client].node if client in self.clients else node
        if before != node and before in connected:
            raise WireError(f"Two nodes call themselves client {client}: give each its own client-id or partition-id.")
        self.clients[client] = Client(node, examples)

    # ------------------------------------------------------------------ a round

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Open the round and write one instruction to each of its clients. `config` has the attempt, from 1."""
        self.state = self.rules.begin_round(self.state)
        self._publish()
        examples = {name: client.examples for name, client in self.clients.items()}
        chosen = sample_clients(self.config, server_round, examples, int(str(config.get("attempt", 1))))
        self.tally = Tally(clients=list(chosen))
        self._asked = {}
        emit(RoundStarted(server_round, chosen))
        return [self._instruct(server_round, client) for client in chosen]

    def configure_catch_up(self, server_round: int, replies: Iterable[Message]) -> list[Message]:
        """Complete instructions for the clients that answered that they lack pools (they restarted, say)."""
        client_of = {message_id: client for client, message_id in self._asked.items()}
        late = [reply for reply in replies if _answers(reply) in client_of and is_behind(reply)]
        behind = [client_of[_answers(reply)] for reply in late]
        for client, reply in zip(behind, late, strict=True):
            self._count(client, sent_up(reply))
            self.clients[client].pools_held, self.clients[client].known = 0, None
        return [self._instruct(server_round, client) for client in behind]

    def note_sent(self, sent: Iterable[Message]) -> None:
        """Remember the message ids, which Flower assigns when messages are pushed."""
        node_to_client = {client.node: name for name, client in self.clients.items()}
        for message in sent:
            client = node_to_client[message.metadata.dst_node_id]
            self._asked[client] = message.metadata.message_id
            self._count(client, sent_down(message))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Use every valid update, refuse the others by name, and move the state; too few of them leave it as it is."""
        client_of = {message_id: client for client, message_id in self._asked.items()}
        tally = self.tally
        for reply in replies:
            client = client_of.pop(_answers(reply), None)
            if client is None:
                emit(Note("A reply that nobody asked for was ignored.", warning=True))
                continue
            self._count(client, sent_up(reply))
            try:
                tally.updates[client], tally.payloads[client] = self._read(server_round, reply)
                self.clients[client].pools_held = len(self._model.pools) - 1
                newest = self._model.pools[-1]
                self.clients[client].known = None if newest.pool.disjoint else newest
                self._finished(server_round, client, "")
            except FedtuneError as problem:
                self.clients[client].known, tally.problems[client] = None, problem
                self._finished(server_round, client, f"{type(problem).__name__}: {problem}")
        for client in sorted(client_of.values(), key=natural_order):
            self.clients[client].known = None
            self._finished(server_round, client, f"no answer within {self.config.round_timeout:g} s")
        tally.short = len(tally.updates) < self.config.needed_replies
        if tally.short:
            needed = self.config.needed_replies
            self._use_none(server_round, f"not used: {len(tally.updates)} usable updates came, a round needs {needed}")
        else:
            self._move(server_round, tally.updates)
        return None, MetricRecord({"clients": len(self.tally.clients) - len(self.tally.refused)})

    def _count(self, client: str, traffic: Traffic) -> None:
        """Add to the bytes of the round; a party that trains alone sends nothing to another."""
        if not self.config.alone:
            self.tally.count(client, traffic)

    def _instruct(self, server_round: int, client: str) -> Message:
        known = self.clients[client]
        held = min(known.pools_held, len(self._model.pools) - 1)
        instruction = Instruction(
            round=server_round,
            fingerprint=self.fingerprint,
            layout=self.layout.digest,
            digest=self._digest,
            held=held,
            pools=self._model.pools[held:],
            draw_weights=self.algorithm.draw_weights(self.state),
            counts=self.rules.counts(self.state).astype(np.uint16),
            known=known.known,
        )
        payload = wire.encode_instruction(instruction, self.config.coefficient_bits)
        content = RecordDict({RECORD: ConfigRecord({"payload": payload, "seconds": working_seconds(self.config)})})
        return Message(
            content,
            dst_node_id=known.node,
            message_type=MessageType.TRAIN,
            ttl=self.config.round_timeout,
            group_id=str(server_round),
        )

    def _read(self, server_round: int, reply: Message) -> tuple[Update, bytes]:
        payload = _content(reply).get("payload")
        if not isinstance(payload, bytes):
            raise errors.MalformedMessageError("The reply carries no payload of bytes.")
        update = read_update(self.rules, self.state, payload, round=server_round, digest=self._digest)
        if update.status == Status.NOT_FINITE:
            raise NonFiniteError(
                f"the loss was not finite after {update.steps} of {self.config.client_steps} steps: "
                "the update is not used (lower lr or eps)"
            )
        if not update.steps:
            raise errors.MalformedMessageError("The update has no steps.")
        return update, payload

    def _move(self, server_round: int, updates: dict[str, Update]) -> None:
        """Aggregate, and keep the result only if it can be published."""
        moved = self.rules.aggregate(self.state, updates)
        try:
            quantise(moved.pool, moved.values, self.config.coefficient_bits)
        except NonFiniteError as problem:
            self.tally.short = True
            self._use_none(server_round, f"NonFiniteError: {problem}")
            return
        self.state = moved
        examples = {client: updates[client].examples for client in sorted(updates)}
        losses = sum(updates[client].train_loss * count for client, count in examples.items())
        self.tally.train_loss = losses / sum(examples.values())
        self._publish()

    def _use_none(self, server_round: int, problem: str) -> None:
        """Leave the state as it is, and say of each update why it is not used."""
        for client in sorted(self.tally.updates, key=natural_order):
            self._finished(server_round, client, problem)
        self.tally.updates, self.tally.payloads = {}, {}

    def _publish(self) -> None:
        self._model = self.state.published(self.config.coefficient_bits)
        self._digest = self._model.digest(self.fingerprint)

    def _finished(self, server_round: int, client: str, problem: str) -> None:
        if problem:
            problem = redact(problem)
            self.tally.refused[client] = problem
        emit(ClientFinished(server_round, client, problem))

    # ------------------------------------------------------------------ required by Flower

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """No messages: the server evaluates on held-out data of its own."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to aggregate."""
        return None

    def summary(self) -> None:
        """Say what this strategy is."""
        shape = f"{self.layout.blocks} x {self.state.pool.size} coefficients"
        emit(Note(f"{self.algorithm.name}: {self.layout.numel:,} parameters, {shape}, family {self.state.pool.family}"))


def _content(reply: Message) -> ConfigRecord:
    """The record of a reply. Raises the client's problem as the error type it names, or RunError for a crash."""
    if reply.has_error():
        raise errors.RunError(
            f"the client failed (Flower code {reply.error.code}): {reply.error.reason}", code=reply.error.code
        )
    record = reply.content.config_records.get(RECORD)
    if record is None:
        raise errors.MalformedMessageError("The reply has no fedtune record.")
    name = record.get("problem")
    if isinstance(name, str):
        kind = getattr(errors, name, FedtuneError)
        known = isinstance(kind, type) and issubclass(kind, FedtuneError)
        raise (kind if known else FedtuneError)(str(record.get("text", "")))
    return record


def sent_down(message: Message) -> Traffic:
    """What an instruction weighs."""
    payload, serialised = _weight(message)
    return Traffic(payload_down=payload, serialised_down=serialised, messages_down=1)


def sent_up(reply: Message) -> Traffic:
    """What a client's answer weighs; only one with a payload counts as a message of a round."""
    payload, serialised = _weight(reply)
    return Traffic(payload_up=payload, serialised_up=serialised, messages_up=1 if payload else 0)


def _weight(message: Message) -> tuple[int, int]:
    """Bytes of the payload, and of the message as Flower serialises it."""
    record = None if message.has_error() else message.content.config_records.get(RECORD)
    payload = record.get("payload") if record else None
    return len(payload) if isinstance(payload, bytes) else 0, message_to_proto(message).ByteSize()


def working_seconds(config: RunConfig) -> float:
    """Seconds of a round that a client may work: the rest is for the way there and back."""
    return config.round_timeout - min(LONGEST_WAY, config.round_timeout * WAY_SHARE)


def is_behind(reply: Message) -> bool:
    """Whether the client answered that it lacks pools which the instruction builds upon."""
    record = None if reply.has_error() else reply.content.config_records.get(RECORD)
    return record is not None and record.get("problem") == errors.StaleReplicaError.__name__


def _answers(reply: Message) -> str:
    return reply.metadata.reply_to_message_id
