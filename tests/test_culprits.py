"""Which updates are left out where a round cannot be published: the largest, whatever the order, and no more than needed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedtune.algorithms.fedkseed import drawn_seeds
from fedtune.config import RunConfig
from fedtune.culprits import publishable
from fedtune.layout import Layout
from fedtune.replay import Rules
from fedtune.wire import Status, Update
from tests.test_ledger import SHAPES

RULES = Rules(RunConfig(K=64, local_steps=2, lr=1e-3, clients=4), Layout.from_shapes(SHAPES, "one"), b"f" * 16)
STATE = RULES.start()


def update(size: float, examples: int = 10, steps: int = 2) -> Update:
    scalars, none = np.full(steps, size, np.float32), np.zeros(0, np.int64)
    return Update(1, RULES.digest(STATE), Status.FINISHED, steps, examples, 1.0, scalars, none)


def left_out(**updates: Update) -> list[str]:
    return list(publishable(RULES, STATE, updates)[1])


def test_nothing_is_left_out_where_all_fits() -> None:
    updates = {"a": update(1.0), "b": update(-2.0)}
    moved, refused = publishable(RULES, STATE, updates)
    assert refused == {}
    assert RULES.digest(moved) == RULES.digest(RULES.aggregate(STATE, updates))


def test_the_largest_goes_first_and_the_others_count_whatever_the_order() -> None:
    updates = {"a": update(3e38), "b": update(1.0), "c": update(-2e38), "d": update(2.0)}
    expected = RULES.digest(RULES.aggregate(STATE, {"b": updates["b"], "d": updates["d"]}))
    for order in itertools.permutations(updates):
        moved, refused = publishable(RULES, STATE, {client: updates[client] for client in order})
        assert list(refused) == ["a", "c"]
        assert RULES.digest(moved) == expected


def test_what_counts_is_what_an_update_moves_and_not_its_numbers_alone() -> None:
    """A million samples make the smaller numbers the larger step."""
    assert left_out(a=update(3e38), b=update(1e36, examples=1_000_000), c=update(1.0)) == ["b", "a"]


def test_of_two_that_move_as_much_the_first_goes_first() -> None:
    assert left_out(a=update(3e38), b=update(3e38), c=update(1.0)) == ["a", "b"]


def test_what_an_update_moves_depends_on_the_seeds_of_its_client() -> None:
    """Equal numbers along two seeds move less than along one seed twice: the client whose draws meet goes first."""
    drawn = {client: drawn_seeds(RULES.config, 1, client, 64, np.zeros(0, np.uint16)) for client in map(str, range(400))}
    meeting = next(client for client, seeds in drawn.items() if len(set(seeds.tolist())) == 1)
    apart = next(client for client, seeds in drawn.items() if len(set(seeds.tolist())) == 2)
    for first in ("0" + apart, apart):  # whatever the order of the ids
        updates = {meeting: update(2e38), apart: update(2e38), first: update(1.0)}
        assert next(iter(publishable(RULES, STATE, updates)[1])) == meeting


def test_if_none_fits_the_state_stays() -> None:
    moved, refused = publishable(RULES, STATE, {"a": update(3e38), "b": update(-3e38, examples=1)})
    assert moved is STATE
    assert list(refused) == ["a", "b"]
    assert publishable(RULES, STATE, {}) == (STATE, {})


@pytest.mark.parametrize("size", [3e38, -3e38])
def test_the_reason_names_the_size_and_what_to_do(size: float) -> None:
    ((_, reason),) = publishable(RULES, STATE, {"a": update(size), "b": update(1.0)})[1].items()
    assert reason.startswith("it moves a coefficient by ")
    assert "does not fit float32 weights: it is not used (lower lr; if it is this client alone, `fedtune drop`)" in reason
