"""Messages out and answers in, and how long the server waits for them. docs/ledger.md states the policy.

A client that is silent must not hold everybody: once enough have answered, the others have `grace` times as long as that
took, and LEAST_GRACE seconds at least. Before that, and with grace = 0, they have the whole time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.progress import check_stop
from server.replies import answers

POLL_SECONDS = 0.1
NOT_SENT = "no answer: Flower did not take the message"
LEAST_GRACE = 30.0  # seconds; a message, the start of a ClientApp and the polls of Flower alone can take 10


class Patience:
    """How long is waited for clients that were asked at the same time. Time counts from its construction.

    Args:
        timeout: seconds that each exchange may take.
        grace: see the module; 0 for none.
        enough: answers of use after which the grace begins.

    Attributes:
        closed: why a client has not answered: how long it was waited for, or NOT_SENT.
    """

    def __init__(self, *, timeout: float, grace: float, enough: int) -> None:
        self.timeout, self.grace, self.enough, self.closed = timeout, grace, enough, NOT_SENT
        self._asked = self._useful = 0
        self._began = self._since = time.monotonic()
        self._allowed = math.inf  # seconds from `_since` on

    def begin(self, asked: int) -> None:
        """An exchange with so many clients begins; a second one has the grace that the first one earned, from now on."""
        self._asked = self._asked or asked
        self._since = time.monotonic()
        self._end = self._since + self.timeout

    def count(self, useful: int) -> None:
        """So many more answers are of use."""
        self._useful += useful
        if self.grace and self._allowed == math.inf and self._useful >= self.enough:
            self._since = time.monotonic()
            self._allowed = max(self.grace * (self._since - self._began), LEAST_GRACE)

    def over(self) -> bool:
        """Whether nobody is waited for any more in this exchange."""
        now = time.monotonic()
        if now > self._end:
            self.closed = f"no answer within {self.timeout:g} s"
        elif now > self._since + self._allowed:
            self.closed = (
                f"no answer; the round closed after {now - self._began:.0f} s, {now - self._since:.0f} s after "
                f"{self._useful} of {self._asked} had answered: raise grace"
            )
        else:
            return False
        return True


def exchange(
    grid: Grid,
    messages: Sequence[Message],
    patience: Patience,
    take: Callable[[list[Message]], int],
    *,
    one_by_one: bool = False,
) -> None:
    """Send messages and collect the answers that come in time (`collect`).

    Args:
        one_by_one: messages or answers are so large that several should not be there at a time.
    """
    if not messages:
        return
    patience.begin(len(messages))
    waiting = set[str]()
    for part in ([message] for message in messages) if one_by_one else (messages,):
        waiting.update(message_id for message_id in grid.push_messages(part) if message_id)  # none if Flower did not send it
        if one_by_one and waiting:
            waiting -= _arrived(grid, waiting, patience, take)  # where clients work in this process, what this one has made
    collect(grid, waiting, patience, take)


def collect(grid: Grid, message_ids: Iterable[str], patience: Patience, take: Callable[[list[Message]], int]) -> None:
    """Wait for the answers to messages, as far as they come in time.

    Args:
        take: gets the answers as they come; returns how many of them are of use. Nothing else keeps them.
    """
    waiting = set(message_ids)
    while waiting:
        waiting -= _arrived(grid, waiting, patience, take)
        check_stop()
        if not waiting or patience.over():
            break
        time.sleep(POLL_SECONDS)


def _arrived(grid: Grid, waiting: set[str], patience: Patience, take: Callable[[list[Message]], int]) -> set[str]:
    """Take the answers that have come; returns the ids of the messages that they answer."""
    arrived = list(grid.pull_messages(list(waiting)))
    patience.count(take(arrived))
    return {answers(reply) for reply in arrived}
