"""Who the connected nodes are: all are asked before the first round, and those that connect later between two rounds.

Between rounds nobody waits for the answer; the next round after it may ask them to train, and its instruction holds all that
they lack. Who is late before the first round is taken like one that came later.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.errors import FedtuneError
from fedtune.progress import Note, emit
from server.exchange import Patience, collect
from server.nodes import Node, connected_nodes
from server.replies import answers
from server.strategy import CoefficientStrategy


class Newcomers:
    """Who was asked already, and whose answer is still to come."""

    def __init__(self, grid: Grid, strategy: CoefficientStrategy) -> None:
        self.grid, self.strategy = grid, strategy
        self._asked: set[int] = set()
        self._waiting: dict[str, Node] = {}

    def greet_all(self, patience: Patience) -> tuple[int, list[FedtuneError]]:
        """Ask every node who it is and wait for the answers; returns how many were asked, and what was wrong with some."""
        connected = connected_nodes(self.grid)
        problems: list[FedtuneError] = []

        def take(replies: list[Message]) -> int:
            before = len(self.strategy.clients)
            problems.extend(self._take(replies, connected))
            return len(self.strategy.clients) - before

        patience.begin(len(connected))
        self._ask(self.strategy.configure_introduction(connected), connected)
        collect(self.grid, list(self._waiting), patience, take)
        return len(connected), problems

    def greet(self) -> None:
        """Take the answers that have come, and ask the nodes that are new, were away or are in doubt, who they are."""
        connected = connected_nodes(self.grid)
        self._waiting = {message_id: node for message_id, node in self._waiting.items() if node.id in connected}
        self._asked &= connected.keys()  # one that comes back has lost what it kept, and may be another machine
        self._asked -= self.strategy.roster.doubtful() - {node.id for node in self._waiting.values()}
        questions = self.strategy.configure_introduction(connected.keys() - self._asked)
        if questions:
            self._ask(questions, connected)
        if self._waiting:
            before = set(self.strategy.clients)
            self._take(list(self.grid.pull_messages(list(self._waiting))), connected)
            for client in sorted(set(self.strategy.clients) - before):
                emit(Note(f"Client {client} joins the run."))

    def _ask(self, questions: list[Message], connected: Mapping[int, Node]) -> None:
        ids = list(self.grid.push_messages(questions))
        nodes = [message.metadata.dst_node_id for message in questions]
        self._asked.update(nodes)
        self._waiting.update({message_id: connected[node] for message_id, node in zip(ids, nodes, strict=True) if message_id})

    def _take(self, replies: list[Message], connected: Mapping[int, Node]) -> list[FedtuneError]:
        problems = self.strategy.roster.accept(self._waiting, replies, connected)
        for reply in replies:
            self._waiting.pop(answers(reply), None)
        return problems
