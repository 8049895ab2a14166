"""What ends a run for want of any result: a first round that failed for every client alike, or a model that is still the base.

One client never ends a run: a failure counts as everybody's only if all that were asked have it, and at least two were (or
there is only one). What passes by itself, such as a deadline, and what depends on the step, such as a loss that is not
finite, is left to the rule of several rounds in a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.errors import DeadlineError, FedtuneError, NonFiniteError, RunError, StaleReplicaError, UnchangedError
from server.strategy import Tally

PASSING = (DeadlineError, StaleReplicaError, NonFiniteError)
BROKEN = (1, 2, 7, 8)
"""Flower's codes for an app that cannot be loaded, raised, or does not fit. The others are of messages and nodes, and pass."""


def failed_alike(tally: Tally, known: int) -> FedtuneError | None:
    """The error that every client of the round answered with, to end the run with; None if there is no such.

    Args:
        tally: of the round.
        known: clients that the server could have asked.
    """
    asked, problems = tally.clients, tally.problems
    if set(problems) != set(asked) or len(asked) < min(2, known):
        return None
    if any(_passes(problem) for problem in problems.values()) or len({type(problem) for problem in problems.values()}) > 1:
        return None
    if len({_without_names(str(problem), asked) for problem in problems.values()}) > 1:
        return None
    first = asked[0]
    kind = type(problems[first])
    text = tally.refused[first].removeprefix(f"{kind.__name__}: ")
    who = f"the only client, {first}," if len(asked) == 1 else f"all {len(asked)} clients that were asked"
    return kind(f"Nobody could serve the round: {who} failed with the same reason: {text}")


def _passes(problem: FedtuneError) -> bool:
    """Whether the next round may go well although nothing was mended."""
    if isinstance(problem, RunError):
        return problem.facts.get("code") not in BROKEN
    return isinstance(problem, PASSING)


def _without_names(text: str, clients: Sequence[str]) -> str:
    """The text with every client's id replaced, so that the same reason is the same text."""
    names = "|".join(re.escape(client) for client in sorted(clients, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{names})(?!\w)", "CLIENT", text)


def unchanged(rows: Sequence[Mapping[str, Any]]) -> UnchangedError | None:
    """Why the model after the last of `rows` (metrics.jsonl) is still the base model; None if it is not."""
    if rows[-1]["digest"] != rows[0]["digest"]:
        return None
    updates = sum(len(row["clients"]) - len(row["refused"]) for row in rows[1:])
    rounds = len(rows) - 1
    if updates:
        why = f"the {updates} updates that were used are zero: give a larger lr or eps"
    else:
        last = "; ".join(f"client {client}: {reason}" for client, reason in sorted(rows[-1]["refused"].items()))
        why = f"no update was usable in any round. The last reasons: {last or 'no client was asked'}"
    return UnchangedError(f"After {rounds} {'round' if rounds == 1 else 'rounds'} the model is still the base model: {why}.")
