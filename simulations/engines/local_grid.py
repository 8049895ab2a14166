"""A Flower Grid that calls a ClientApp directly: no processes, no Ray, every client in this process.

The same ServerApp and ClientApp run on it as in Flower's simulation and in a deployment. It behaves like those where
that can be seen: what is sent passes through protobuf bytes, a ClientApp that raises becomes an error of code 2, node
ids are large and say nothing about a client, and replies refer to a message by id.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import FedtuneError, Interrupted
from fedtune.records import is_large
from fedtune.seeds import Stream
from simulations.engines import flower_internals as internals

ClientHandler = Callable[[Message, Context], Message]
Scalar = bool | int | float | str

_log = logging.getLogger(__name__)


def _no_drop(message: Message) -> bool:
    return False


def _as_is(message: Message, reply: Message) -> Message:
    return reply


@dataclass(frozen=True)
class Faults:
    """Faults to inject, for tests.

    Attributes:
        drop: of a message; True: the client never sees it and no reply comes.
        tamper: of a message and its reply; what the server receives instead of the reply.
        empty_polls: number of calls of `get_node_ids` that find nobody connected yet, as in every real runtime.
    """

    drop: Callable[[Message], bool] = _no_drop
    tamper: Callable[[Message, Message], Message] = _as_is
    empty_polls: int = 0


class _Contexts(dict[int, Context]):
    """The context of each node by its id, made when it is first asked for: of a million clients few are."""

    def __init__(self, first: Callable[[int], Context]) -> None:
        super().__init__()
        self._first = first

    def __missing__(self, node_id: int) -> Context:
        found = self[node_id] = self._first(node_id)
        return found


class LocalGrid(Grid):
    """`nodes` clients that share this process and answer one after another, in the order of the messages.

    - `push_messages` runs the clients; their replies can be pulled when it returns.
    - Time to live, and the timeout of `send_and_receive`, count from the moment a client starts on its message, as if
      all clients worked at the same time. A client that took longer is answered for by an error of code 3 (time to
      live) or by a missing reply (timeout; it can still be pulled by id), like in a deployment.
    - `Context.state` of a node persists from message to message. What a handler changed before it raised is dropped,
      as in Flower's simulation (a deployment keeps it, so handlers should change the state last).
    - `fedtune.errors.Interrupted`, KeyboardInterrupt and SystemExit leave the grid; all other exceptions of a client
      become error replies.

    One grid at a time: Flower keeps the identity of the running task in class attributes, which the constructor sets.
    """

    def __init__(
        self,
        client_app: ClientHandler,
        nodes: int,
        run_config: Mapping[str, Scalar],
        *,
        node_configs: Mapping[int, Mapping[str, Scalar]] | None = None,
        seed: int = 0,
        run_id: int = 1,
        serialise: bool = True,
        faults: Faults | None = None,
        registered: bool = True,
    ) -> None:
        """Connect `nodes` clients.

        Args:
            client_app: a Flower ClientApp, or any function with its signature.
            nodes: number of clients; client i has node_config {"partition-id": i, "num-partitions": nodes}.
            run_config: Flower's run config, the same for all.
            node_configs: further node config by partition id.
            seed: names the stream of node ids.
            run_id: Flower's id of the run.
            serialise: pass messages through protobuf bytes. Without it, server and clients share the objects sent.
            faults: faults to inject.
            registered: every node has a key and is registered under its partition's number, as in a deployment; otherwise
                nodes have neither, as in Flower's simulation.
        """
        internals.adopt_identity(run_id)
        self.client_app = client_app
        self.serialise, self.registered = serialise, registered
        self.faults = faults or Faults()
        self._run = internals.empty_run(run_id)
        self._run_config = dict(run_config)
        self._polls = 0
        self._messages = 0
        self._replies: dict[str, Message] = {}
        self._seconds: dict[str, float] = {}
        self.nodes = {node_id: partition for partition, node_id in enumerate(_node_ids(seed, nodes))}
        self._node_configs = node_configs or {}
        self.contexts = _Contexts(self._first_context)

    def server_context(self) -> Context:
        """A fresh context for the ServerApp of this run."""
        return self._context(internals.SUPERLINK, {})

    def _first_context(self, node_id: int) -> Context:
        partition = self.nodes[node_id]
        own = self._node_configs.get(partition, {})
        return self._context(node_id, {"partition-id": partition, "num-partitions": len(self.nodes), **own})

    def _context(self, node_id: int, node_config: dict[str, Scalar]) -> Context:
        return Context(
            run_id=self._run.run_id,
            node_id=node_id,
            node_config=node_config,
            state=RecordDict(),
            run_config=dict(self._run_config),
        )

    # ------------------------------------------------------------------ Flower's interface

    def set_run(self, run: internals.Run) -> None:
        self._run = run

    @property
    def run(self) -> internals.Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        self._polls += 1
        return [] if self._polls <= self.faults.empty_polls else list(self.nodes)

    def get_nodes(self) -> list[internals.NodeInfo]:
        return [self._node(node_id) for node_id in self.get_node_ids()]

    def _node(self, node_id: int) -> internals.NodeInfo:
        if not self.registered:
            return internals.NodeInfo(node_id=node_id)
        return internals.NodeInfo(node_id=node_id, name=str(self.nodes[node_id]), public_key=f"key of {node_id}".encode())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run every message's client to its end; returns the ids given to the messages, in their order.

        Raises:
            ValueError: a message that was sent before, or for a node that does not exist; nothing was run.
        """
        batch = list(messages)
        for message in batch:
            if message.metadata.message_id or message.metadata.dst_node_id not in self.nodes:
                raise ValueError(f"A message must be new and for one of the grid's nodes: {message.metadata}")
        for message in batch:
            internals.give_id(message, self._next_id())
        for message in batch:
            started = time.monotonic()
            reply = self._deliver(message)
            if reply is not None:
                self._seconds[message.metadata.message_id] = time.monotonic() - started
                self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to `message_ids` that exist and were not pulled before, in the order of the ids."""
        found = [message_id for message_id in message_ids if message_id in self._replies]
        for message_id in found:
            del self._seconds[message_id]
        return [self._replies.pop(message_id) for message_id in found]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push `messages` and pull the replies of the clients that took at most `timeout` seconds."""
        ids = self.push_messages(messages)
        seconds = [self._seconds.get(message_id, 0.0) for message_id in ids]
        return self.pull_messages(i for i, took in zip(ids, seconds, strict=True) if timeout is None or took <= timeout)

    # ------------------------------------------------------------------ one message

    def _next_id(self) -> str:
        self._messages += 1
        return f"local-{self._run.run_id}-{self._messages}"

    def _deliver(self, message: Message) -> Message | None:
        """The reply to `message` as the server receives it, or None if none will come."""
        if self.faults.drop(message):
            return None
        message = internals.restamp(message)  # what the client gets; the server keeps its own
        deadline = time.monotonic() + message.metadata.ttl
        reply = self._call(message)
        if time.monotonic() > deadline:
            reply = internals.expired(message, f"The reply came after the time to live of {message.metadata.ttl:g} s.")
        return internals.give_id(self.faults.tamper(message, reply), self._next_id())

    def _call(self, message: Message) -> Message:
        """Call the ClientApp with a copy of its node's state, which replaces the state unless the call raises."""
        node_id = message.metadata.dst_node_id
        kept = self.contexts[node_id]
        context = copy.copy(kept)
        context.state = copy.deepcopy(kept.state)
        try:
            reply = self.client_app(self._carry(message), context)
            reply = self._carry(reply)
        except Interrupted:
            raise
        except Exception as error:
            level = logging.DEBUG if isinstance(error, FedtuneError) else logging.ERROR
            _log.log(level, "Client %s raised", kept.node_config["partition-id"], exc_info=error)
            # The text that a deployed ClientApp process reports.
            reason = str(type(error)) + ":<'" + str(error) + "'>"
            return self._carry(Message(Error(code=internals.CLIENT_RAISED, reason=reason), reply_to=message))
        self.contexts[node_id] = context
        return reply

    def _carry(self, message: Message) -> Message:
        """What arrives of `message`. A payload as large as a model is not copied: nobody can change its bytes."""
        return internals.through_bytes(message) if self.serialise and not is_large(message) else message


def _node_ids(seed: int, nodes: int) -> list[int]:
    """`nodes` different ids of 63 bits that, like a SuperLink's, have no relation to the order of the clients."""
    ids = [int(word) >> 1 for word in Stream(seed, "node ids").words64(nodes)]
    return [node_id if node_id > internals.SUPERLINK else node_id + 2 for node_id in ids]
