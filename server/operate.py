"""A run that is told what to do while it goes on: the commands of `fedtune.control`, taken between rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fedtune.control import Command, Doing, Order, remove, say, waiting
from fedtune.errors import ControlError, Interrupted
from fedtune.foreign import for_file
from fedtune.progress import Note, check_stop, emit
from server.record import Record
from server.strategy import CoefficientStrategy

POLL_SECONDS = 0.5


class Operator:
    """Follows commands. `evaluate_now` is set when somebody asked for an evaluation."""

    def __init__(self, record: Record, strategy: CoefficientStrategy) -> None:
        self.record, self.strategy = record, strategy
        self.evaluate_now = False
        self._paused = False

    def heed(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Follow every command that waits, and wait while the run is paused; do `meanwhile` again and again then.

        Raises:
            Interrupted: the run was told to stop; everything is committed, and a resume goes on from here.
        """
        self._follow_all()
        if self._paused:
            self.say(Doing.PAUSED)
        while self._paused:
            check_stop()
            meanwhile()
            time.sleep(POLL_SECONDS)
            self._follow_all()
        self.say(Doing.RUNNING)

    def say(self, doing: Doing, error: str = "") -> None:
        """Tell `fedtune status` how far the run is."""
        config = self.record.config
        say(self.record.folder, doing, round=self.record.last, rounds=config.rounds, error=error)

    def _follow_all(self) -> None:
        paths = waiting(self.record.folder)
        done = {event.detail["name"] for event in self.record.ledger.events("command")} if paths else set()
        for path in paths:
            stop = for_file(path.name) not in done and self._follow(path)
            remove(path)
            if stop:
                raise Interrupted(f"Stopped by `fedtune stop` after round {self.record.last}; a resume goes on from there.")

    def _follow(self, path: Path) -> bool:
        """Follow one command and write that down; returns whether it was to stop."""
        try:
            order = Order.at(path)
            self._check(order)
        except ControlError as problem:
            emit(Note(f"The command '{for_file(path.name)}' was refused: {problem}", warning=True))
            self._write(path, {"refused": for_file(str(problem))})
            return False
        if order.command is Command.DROP:
            self._drop(order.client)
        self._paused = order.command is Command.PAUSE or (self._paused and order.command is not Command.UNPAUSE)
        self.evaluate_now = self.evaluate_now or order.command is Command.EVALUATE
        emit(Note(f"Told to {order.command}{' client ' + order.client if order.client else ''}."))
        self._write(path, {"command": order.command.value, "client": order.client})
        return order.command is Command.STOP

    def _check(self, order: Order) -> None:
        """Refuse to drop an unknown client, or the last one. Before clients have introduced themselves any id is taken."""
        if order.command is not Command.DROP or order.client in self.strategy.dropped:
            return
        if not self.strategy.clients:
            if self.strategy.roster.wanted <= 1:
                raise ControlError(f"Client {order.client} would be the last one: stop the run instead.")
            return
        left = set(self.strategy.clients) - {order.client}
        if order.client not in self.strategy.clients:
            raise ControlError(f"There is no client {order.client!r}: `fedtune ledger show` lists them.")
        if not left:
            raise ControlError(f"Client {order.client} is the last one: stop the run instead.")

    def _drop(self, client: str) -> None:
        if client not in self.record.dropped():
            self.record.ledger.commit_event("drop", {"client": client}, self.record.elapsed)
        self.strategy.dropped.add(client)
        self.strategy.clients.pop(client, None)

    def _write(self, path: Path, detail: dict[str, str]) -> None:
        self.record.ledger.commit_event("command", {"name": for_file(path.name), **detail}, self.record.elapsed)
