"""One client's numbers never take the others down: which updates have to go so that the others can be published.

A state is published only if its coefficients fit float32 weights. Where a round's do not, the update that moves a coefficient
most is left out, then the next one, until the rest fit. What an update moves is measured alone, so that neither order of
arrival nor the company that it is in decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import numpy as np

from fedtune.algorithms import State
from fedtune.algorithms.base import shares
from fedtune.errors import NonFiniteError
from fedtune.replay import Rules
from fedtune.wire import Update


def publishable(rules: Rules, state: State, updates: Mapping[str, Update]) -> tuple[State, dict[str, str]]:
    """What the updates of a round lead to, without those that are too large; and of each of those, why.

    Args:
        updates: by client id; of two that move as much, the first one goes first.

    Returns:
        The state, `state` itself if no update is left; and the reasons, the largest update first.
    """
    if not updates:
        return state, {}
    try:
        return _fitting(rules, state, updates), {}
    except NonFiniteError:
        sizes = _sizes(rules, state, updates)
    left, refused = dict(updates), dict[str, str]()
    for client in sorted(updates, key=lambda client: -sizes[client]):
        del left[client]
        refused[client] = (
            f"it moves a coefficient by {sizes[client]:.3g}, and with it the model does not fit float32 weights: "
            "it is not used (lower lr; if it is this client alone, `fedtune drop`)"
        )
        if left:
            with suppress(NonFiniteError):
                return _fitting(rules, state, left), refused
    return state, refused


def _fitting(rules: Rules, state: State, updates: Mapping[str, Update]) -> State:
    """What the updates lead to. Raises NonFiniteError if that cannot be published."""
    moved = rules.aggregate(state, updates)
    moved.published(rules.config.coefficient_bits)
    return moved


def _sizes(rules: Rules, state: State, updates: Mapping[str, Update]) -> dict[str, float]:
    """By how much each update moves a coefficient at most: its share of what it does alone."""
    return {
        client: share * _size(rules, state, client, updates[client]) for client, share in shares(updates, rules.config).items()
    }


def _size(rules: Rules, state: State, client: str, update: Update) -> float:
    """The largest change of a coefficient by an update alone, against one of zeros."""
    nothing = replace(update, scalars=np.zeros_like(update.scalars))
    change = rules.aggregate(state, {client: update}).values - rules.aggregate(state, {client: nothing}).values
    size = float(np.abs(change).max(initial=0.0))
    return size if math.isfinite(size) else math.inf
