"""Who takes part: introductions are taken, or refused by name, and an id stays with the node that it belongs to.

An id belongs to the node that is registered under it; else to the key that had it first, which the ledger remembers; and
where keys say nothing (no node authentication, Flower's simulation) to a node for as long as that is connected.
Ids that differ in case only are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message

from fedtune.coefficients import PoolCoefficients
from fedtune.config import RunConfig
from fedtune.errors import FedtuneError, MalformedMessageError, MismatchError, RunError
from fedtune.foreign import client_id, for_file
from fedtune.progress import Note, emit
from fedtune.records import record_in
from server.nodes import Node
from server.replies import answers, content_of
from server.sampling import natural_order

LEAST_COMPARED = 3  # clients; of two, one always has half of the samples


@dataclass
class Client:
    """What the server knows about a client: Flower's node id, number of samples, pools that it holds.

    `known` is what it has of the pool after those: that of the instruction which it answered last. None: perhaps nothing.
    """

    node: int
    examples: int
    pools_held: int = 0
    known: PoolCoefficients | None = None


class Roster:
    """The clients of a run.

    Args:
        config: its settings.
        check_fit: of an introduction; raises what is wrong with model, directions or version.
        dropped: ids of clients that take no part.
        keys: the key that each id belongs to, as earlier processes wrote it down.

    Attributes:
        clients: by id.
        dropped: as above.
    """

    def __init__(
        self, config: RunConfig, check_fit: Callable[[ConfigRecord], None], dropped: Iterable[str], keys: Mapping[str, str]
    ) -> None:
        self.config, self._check_fit = config, check_fit
        self.clients: dict[str, Client] = {}
        self.dropped = set(dropped)
        self._keys = {client.lower(): key for client, key in keys.items()}
        self._new_keys: dict[str, str] = {}
        self._again: set[int] = set()
        self._warned: set[str] = set()

    # ------------------------------------------------------------------ introductions

    def accept(
        self, asked: Mapping[str, Node], replies: Iterable[Message], connected: Mapping[int, Node]
    ) -> list[FedtuneError]:
        """Keep the clients that can take part; report the others by name, and return their problems.

        Args:
            asked: node of every question, by message id.
            replies: to them.
            connected: nodes that are connected now. A client whose node is not among them may come back as another node.
        """
        claims = _Claims(self.clients, connected)
        problems: list[FedtuneError] = []
        known = [(asked[answers(reply)], reply) for reply in replies if answers(reply) in asked]
        for node, reply in sorted(known, key=lambda pair: pair[0].id):
            try:
                self._take(node, content_of(reply), claims)
            except FedtuneError as problem:
                refusal = type(problem)(for_file(f"{_called(reply, node)} was refused: {problem}"), **problem.facts)
                problems.append(refusal)
                emit(Note(str(refusal), warning=True))
        return problems

    def _take(self, node: Node, record: ConfigRecord, claims: _Claims) -> None:
        client = client_id(record.get("client"))
        examples = self._examples(record.get("examples"))
        self._check_fit(record)
        if self._is_dropped(client, node):
            self.clients.pop(claims.called(node), None)
            emit(Note(f"Client {client} was dropped from the run and takes no part."))
            return
        self._check_owner(client, node, claims)
        for other in claims.replaced_by(client, node):
            if self.clients.pop(other, None) and other != client:
                emit(Note(f"Client {other} calls itself {client} now: nobody is asked as {other} any more."))
        self.clients[client] = Client(node.id, examples)
        claims.add(client, node)
        if node.key and self._keys.get(client.lower()) != node.key:
            self._keys[client.lower()] = self._new_keys[client] = node.key

    def _examples(self, said: object) -> int:
        """The number of samples of an introduction."""
        parties = self.config.clients if self.config.alone else 1  # one with the samples of all
        most = self.config.max_examples * parties
        if isinstance(said, bool) or not isinstance(said, int) or not 1 <= said <= most:
            shown = said if isinstance(said, int | float) else type(said).__name__
            raise MalformedMessageError(
                f"it says that it has {shown} training samples: a whole number from 1 to {most} was "
                "expected (raise max_examples if it is right)."
            )
        return said

    def _is_dropped(self, client: str, node: Node) -> bool:
        """Whether a client, or the node that was asked under its id, was dropped."""
        ids = {other.lower() for other in self.dropped}
        return client.lower() in ids or node.key in {self._keys.get(other) for other in ids}

    def _check_owner(self, client: str, node: Node, claims: _Claims) -> None:
        """Refuse an id that is another node's."""
        own = node.name.lower() == client.lower()
        if not own and client.lower() in claims.names:
            raise MismatchError(
                f"another node is registered under the name '{client}': give this one an id of its own (CLIENT_ID in node.env)."
            )
        key = self._keys.get(client.lower())
        if not own and key not in (None, node.key):
            raise MismatchError(
                f"client id '{client}' belongs to the key of the node that had it first: give this one an id of its own, or, "
                f"if it is the same client with a new key, register that under the name '{client}'."
            )
        holder = claims.holder(client)
        if holder is None or holder.id == node.id:
            return
        if not own or holder.name.lower() == client.lower():
            raise MismatchError(f"Two nodes call themselves client {client}: give each its own client-id or partition-id.")
        emit(Note(f"Client {client} is from now on the node that is registered under that name.", warning=True))

    # ------------------------------------------------------------------ enough of them

    @property
    def wanted(self) -> int:
        """Nodes without which the run does not start."""
        return (self.config.min_clients or self.config.clients) - len(self.dropped)

    def check_enough(self, asked: int, problems: Sequence[FedtuneError]) -> None:
        """Raise the first client's problem if fewer clients remain, of the `asked` nodes, than the first round needs."""
        needed = min(1 if self.config.alone else self.config.asked_per_round, self.wanted)
        if len(self.clients) < needed:
            raise (
                problems[0]
                if problems
                else RunError(
                    f"Only {len(self.clients)} of {asked} nodes introduced themselves; a round asks "
                    f"{needed}. Start more nodes, or lower clients_per_round."
                )
            )

    def warn_of_weight(self) -> None:
        """Say once of a client that it has more than half of all samples: what it sends outweighs all others together."""
        if self.config.weighting != "examples" or self.config.alone or len(self.clients) < LEAST_COMPARED:
            return
        client = max(sorted(self.clients, key=natural_order), key=lambda name: self.clients[name].examples)
        most, total = self.clients[client].examples, sum(one.examples for one in self.clients.values())
        if 2 * most > total and client not in self._warned:
            self._warned.add(client)
            emit(
                Note(
                    f"Client {client} says that it has {most} of all {total} training samples, so that its updates outweigh "
                    'all others. If that is not so: weighting = "equal", or a lower max_examples.',
                    warning=True,
                )
            )

    # ------------------------------------------------------------------ what others take from here

    def ask_again(self, client: str) -> None:
        """Have the node of a client asked who it is before the next round: its answer was that of another one."""
        if client in self.clients:
            self._again.add(self.clients[client].node)

    def doubtful(self) -> set[int]:
        """The nodes that `ask_again` named since the last call."""
        found, self._again = self._again, set()
        return found

    def new_keys(self) -> dict[str, str]:
        """Ids that belong to another key than at the last call, with that key: to be written down."""
        found, self._new_keys = self._new_keys, {}
        return found


class _Claims:
    """Who is called what, found without a search over all clients; `names` are those that nodes are registered under."""

    def __init__(self, clients: Mapping[str, Client], connected: Mapping[int, Node]) -> None:
        self._connected = connected
        self.names = {node.name.lower() for node in connected.values() if node.name}
        self._nodes = {client.lower(): known.node for client, known in clients.items()}
        self._spelled = {client.lower(): client for client in clients}
        self._ids = {known.node: client for client, known in clients.items()}

    def called(self, node: Node) -> str:
        """The id of a node; "" if it has none."""
        return self._ids.get(node.id, "")

    def holder(self, client: str) -> Node | None:
        """The connected node that has the id now."""
        return self._connected.get(self._nodes.get(client.lower(), -1))

    def replaced_by(self, client: str, node: Node) -> set[str]:
        """The ids that are given up when `node` becomes `client`."""
        return {found for found in (self._spelled.get(client.lower()), self._ids.get(node.id)) if found is not None}

    def add(self, client: str, node: Node) -> None:
        """`node` is `client` from now on, and nobody else."""
        for old in self.replaced_by(client, node):
            self._spelled.pop(old.lower(), None)
            self._ids.pop(self._nodes.pop(old.lower(), -1), None)
        self._nodes[client.lower()], self._spelled[client.lower()], self._ids[node.id] = node.id, client, client


def _called(reply: Message, node: Node) -> str:
    """What the refused one is called: its client id if that is one, else its node."""
    record = record_in(reply)
    said = record.get("client") if record else None
    try:
        return f"Client {client_id(said)}"
    except MalformedMessageError:
        return node.label
