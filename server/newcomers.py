"""Nodes that connect while the run goes on: they are asked who they are between two rounds, and nobody waits for the answer.

The next round after the answer may ask them to train; its instruction holds all that they lack.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.progress import Note, emit
from server.strategy import CoefficientStrategy


class Newcomers:
    """Who was asked already, and whose answer is still to come.

    Args:
        grid, strategy: of the run.
        asked: nodes that were asked before the first round.
    """

    def __init__(self, grid: Grid, strategy: CoefficientStrategy, asked: Iterable[int]) -> None:
        self.grid, self.strategy = grid, strategy
        self._asked = set(asked)
        self._waiting: dict[str, int] = {}

    def greet(self) -> None:
        """Take the answers that have come, and ask the nodes that are new, or were away, who they are."""
        connected = set(self.grid.get_node_ids())
        self._asked &= connected  # one that comes back has lost what it kept, and may be another machine
        questions = self.strategy.configure_introduction(connected - self._asked)
        if questions:
            self._ask(questions)
        if self._waiting:
            self._take(list(self.grid.pull_messages(list(self._waiting))), connected)

    def _ask(self, questions: list[Message]) -> None:
        ids = list(self.grid.push_messages(questions))
        nodes = [message.metadata.dst_node_id for message in questions]
        self._asked.update(nodes)
        self._waiting.update(zip(ids, nodes, strict=True))

    def _take(self, answers: list[Message], connected: set[int]) -> None:
        before = set(self.strategy.clients)
        self.strategy.accept_introductions(self._waiting, answers, connected)
        for client in sorted(set(self.strategy.clients) - before):
            emit(Note(f"Client {client} joins the run."))
        for answer in answers:
            self._waiting.pop(answer.metadata.reply_to_message_id, None)
