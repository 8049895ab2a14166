"""The Flower Strategy: it turns a state into messages and replies into the next state. Thin: the method is in fedtune.

It keeps the state of the run, remembers what every client already holds, refuses what must not be used (named and
counted), and measures payload bytes where messages are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedtune import wire
from fedtune.algorithms import State
from fedtune.coefficients import Coefficients, PoolCoefficients
from fedtune.config import RunConfig
from fedtune.culprits import publishable
from fedtune.errors import FedtuneError, MismatchError, NonFiniteError
from fedtune.foreign import for_file
from fedtune.pieces import Buffer
from fedtune.progress import ClientFinished, Note, RoundStarted, emit
from fedtune.records import LARGE, RECORD, content_with
from fedtune.replay import Rules, read_update
from fedtune.selftest import SelfTest, self_test
from fedtune.traffic import Traffic
from fedtune.wire import Instruction, Status, Update
from server.admission import check_fit
from server.replies import answers, content_of, is_behind, looks_usable, payload_of, sent_down, sent_up
from server.roster import Client, Roster
from server.sampling import natural_order, sample_clients

WAY_SHARE, LONGEST_WAY = 0.1, 30.0  # of round_timeout, in seconds: for the messages, the last step and the projection


@dataclass
class Tally:
    """What happened in a round.

    Attributes:
        clients: those that were asked; `refused` has the reason for each whose update was not used.
        problems: the errors among those reasons that a client answered with.
        updates, payloads: of the others, as read and as received.
        short: too few updates were usable, so none was used.
        closed: why those that did not answer were not waited for any more.
        traffic: bytes and messages by client.
    """

    clients: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    problems: dict[str, FedtuneError] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)
    payloads: dict[str, Buffer] = field(default_factory=dict)
    short: bool = False
    closed: str = "no answer"
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
        keys: the key that each id belongs to.
        keep: takes a payload out of memory if it is large.
    """

    def __init__(
        self,
        rules: Rules,
        state: State,
        dropped: Iterable[str] = (),
        keys: Mapping[str, str] | None = None,
        keep: Callable[[Buffer], Buffer] = lambda payload: payload,
    ) -> None:
        self.rules, self.config, self.algorithm = rules, rules.config, rules.algorithm
        self.layout, self.fingerprint = rules.layout, rules.fingerprint
        self.state = state
        self.roster = Roster(self.config, self._check_fit, dropped, keys or {})
        self.tally = Tally()
        self._model = self.state.published(self.config.coefficient_bits)
        self._digest = self._model.digest(self.fingerprint)
        self._asked: dict[str, Message] = {}
        self._answered = set[str]()
        self._behind: list[str] = []
        self._keep = keep

    @cached_property
    def _tested(self) -> SelfTest:
        return self_test(self.algorithm.pool(self.config, self.layout, 0))

    def _check_fit(self, record: ConfigRecord) -> None:
        check_fit(record, self.fingerprint, self.layout.digest, self._tested)

    @property
    def clients(self) -> dict[str, Client]:
        """Those that take part, by id."""
        return self.roster.clients

    @property
    def dropped(self) -> set[str]:
        """Ids of those that take no part any more."""
        return self.roster.dropped

    @property
    def sends_much(self) -> bool:
        """Whether an update can be so large that several should not be in memory at a time."""
        return self.algorithm.longest_update(self.config, self.layout) >= LARGE

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

    # ------------------------------------------------------------------ a round

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Open the round and write one instruction to each of its clients. `config` has the attempt, from 1."""
        self.state = self.rules.begin_round(self.state)
        self._publish()
        self.roster.warn_of_weight()
        examples = {name: client.examples for name, client in self.clients.items()}
        chosen = sample_clients(self.config, server_round, examples, int(str(config.get("attempt", 1))))
        self.tally = Tally(clients=list(chosen))
        self._asked, self._answered, self._behind = {}, set(), []
        emit(RoundStarted(server_round, chosen))
        return self._instruct(server_round, chosen)

    def receive(self, server_round: int, replies: Iterable[Message]) -> int:
        """Take answers as they come: valid updates, and who lacks pools; returns how many carry an update, sound or not."""
        client_of = {message.metadata.message_id: client for client, message in self._asked.items()}
        usable = 0
        for reply in replies:
            client = client_of.get(answers(reply))
            if client is None or client in self._answered:
                emit(Note("A reply that nobody asked for was ignored.", warning=True))
                continue
            self._answered.add(client)
            self._count(client, sent_up(reply))
            usable += looks_usable(reply)
            if is_behind(reply) and client not in self._behind:
                self._behind.append(client)
            else:
                self._take(server_round, client, reply)
        return usable

    def configure_catch_up(self, server_round: int) -> list[Message]:
        """Complete instructions for the clients that answered that they lack pools (they restarted, say)."""
        for client in self._behind:
            self.clients[client].pools_held, self.clients[client].known = 0, None
        self._answered -= set(self._behind)
        return self._instruct(server_round, self._behind)

    def note_sent(self, sent: Iterable[Message]) -> None:
        """Count what was sent, once Flower has given the messages their ids."""
        pushed = {id(message) for message in sent}
        for client, message in self._asked.items():
            if id(message) in pushed:
                self._count(client, sent_down(message))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Use every valid update, refuse the others by name, and move the state; too few of them leave it as it is."""
        tally = self.tally
        self.receive(server_round, replies)
        self._asked = {}
        for client in sorted(set(tally.clients) - set(tally.updates) - set(tally.refused), key=natural_order):
            self.clients[client].known = None
            self._finished(server_round, client, tally.closed)
        self._move(server_round, {client: tally.updates[client] for client in sorted(tally.updates, key=natural_order)})
        return None, MetricRecord({"clients": len(tally.clients) - len(tally.refused)})

    def _take(self, server_round: int, client: str, reply: Message) -> None:
        """Keep the update in a reply, or refuse it."""
        known, newest = self.clients[client], self._model.pools[-1]
        try:
            self.tally.updates[client], self.tally.payloads[client] = self._read(server_round, client, reply)
        except FedtuneError as problem:
            known.known, self.tally.problems[client] = None, problem
            if isinstance(problem, MismatchError):
                self.roster.ask_again(client)
            self._finished(server_round, client, f"{type(problem).__name__}: {problem}")
        else:
            known.pools_held = len(self._model.pools) - 1
            known.known = None if newest.pool.disjoint else newest
            self._finished(server_round, client, "")

    def _count(self, client: str, traffic: Traffic) -> None:
        """Add to the bytes of the round; a party that trains alone sends nothing to another."""
        if not self.config.alone:
            self.tally.count(client, traffic)

    def _instruct(self, server_round: int, clients: Sequence[str]) -> list[Message]:
        """One instruction to each of `clients`; those who hold the same get the same bytes, which are there once."""
        payloads: dict[tuple[int, int], bytes] = {}
        for client in clients:
            known = self.clients[client]
            held = min(known.pools_held, len(self._model.pools) - 1)
            holds = held, id(known.known)
            if holds not in payloads:
                payloads[holds] = self._instruction(server_round, held, known.known)
            self._asked[client] = Message(
                content_with(payloads[holds], seconds=working_seconds(self.config)),
                dst_node_id=known.node,
                message_type=MessageType.TRAIN,
                ttl=self.config.round_timeout,
                group_id=str(server_round),
            )
        return [self._asked[client] for client in clients]

    def _instruction(self, server_round: int, held: int, known: PoolCoefficients | None) -> bytes:
        instruction = Instruction(
            round=server_round,
            fingerprint=self.fingerprint,
            layout=self.layout.digest,
            digest=self._digest,
            held=held,
            pools=self._model.pools[held:],
            draw_weights=self.algorithm.draw_weights(self.state),
            counts=self.rules.counts(self.state).astype(np.uint16),
            known=known,
        )
        return wire.encode_instruction(instruction, self.config.coefficient_bits)

    def _read(self, server_round: int, client: str, reply: Message) -> tuple[Update, Buffer]:
        content_of(reply)  # says what problem it names
        payload: Buffer = payload_of(reply)
        if len(payload) <= self.algorithm.longest_update(self.config, self.layout):
            payload = self._keep(payload)
        others = [other for other in self.tally.clients if other != client]
        update = read_update(
            self.rules, self.state, payload, round=server_round, digest=self._digest, client=client, others=others
        )
        if update.status == Status.NOT_FINITE:
            raise NonFiniteError(
                f"the loss was not finite after {update.steps} of {self.config.client_steps} steps: "
                "the update is not used (lower lr or eps)"
            )
        introduced = self.clients[client].examples
        if update.examples != introduced:
            raise MismatchError(
                f"It speaks of {update.examples} samples; the client introduced itself with {introduced}, and is asked again."
            )
        return update, payload

    def _move(self, server_round: int, updates: dict[str, Update]) -> None:
        """Aggregate what can be published, without the updates that are too large for that."""
        moved, too_large = publishable(self.rules, self.state, updates)
        for client, reason in too_large.items():
            self._refuse(server_round, client, f"{NonFiniteError.__name__}: {reason}")
        needed, usable = self.config.needed_replies, dict(self.tally.updates)
        self.tally.short = len(usable) < needed
        if self.tally.short:
            for client in sorted(usable, key=natural_order):
                self._refuse(server_round, client, f"not used: {len(usable)} usable updates came, a round needs {needed}")
            return
        self.state = moved
        counted = [usable[client] for client in sorted(usable)]
        losses = sum(update.train_loss * update.examples for update in counted)
        self.tally.train_loss = losses / sum(update.examples for update in counted)
        self._publish()

    def _refuse(self, server_round: int, client: str, problem: str) -> None:
        """Take back an update that was read."""
        del self.tally.updates[client], self.tally.payloads[client]
        self._finished(server_round, client, problem)

    def _publish(self) -> None:
        self._model = self.state.published(self.config.coefficient_bits)
        self._digest = self._model.digest(self.fingerprint)

    def _finished(self, server_round: int, client: str, problem: str) -> None:
        if problem:
            problem = for_file(problem)
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


def working_seconds(config: RunConfig) -> float:
    """Seconds of a round that a client may work: the rest is for the way there and back."""
    return config.round_timeout - min(LONGEST_WAY, config.round_timeout * WAY_SHARE)
