"""Client sampling: repeatable, by stable id, in proportion where asked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedtune.config import RunConfig
from fedtune.errors import RunError
from fedtune.seeds import Stream
from server.sampling import natural_order, sample_clients

TEN = {str(client): 10 for client in range(10)}


def test_a_round_asks_the_right_number_of_different_clients_in_natural_order() -> None:
    chosen = sample_clients(RunConfig(clients=10, clients_per_round=4), 1, TEN)
    assert len(set(chosen)) == 4
    assert list(chosen) == sorted(chosen, key=natural_order)


def test_the_same_seed_and_round_ask_the_same_clients_whatever_the_order_of_arrival() -> None:
    config = RunConfig(clients=10, clients_per_round=4, seed=5)
    backwards = dict(reversed(TEN.items()))
    assert sample_clients(config, 3, TEN) == sample_clients(config, 3, backwards)
    rounds = {sample_clients(config, number, TEN) for number in range(1, 20)}
    assert len(rounds) > 10


def test_every_client_has_the_same_chance() -> None:
    config = RunConfig(clients=10, clients_per_round=3)
    counts = Counter(client for number in range(1, 1001) for client in sample_clients(config, number, TEN))
    assert all(240 < counts[client] < 360 for client in TEN)


def test_sampling_by_examples_prefers_large_clients() -> None:
    config = RunConfig(clients=3, clients_per_round=1, sampling="examples")
    sizes = {"0": 700, "1": 200, "2": 100}
    counts = Counter(sample_clients(config, number, sizes)[0] for number in range(1, 1001))
    assert abs(counts["0"] / 1000 - 0.7) < 0.06
    assert abs(counts["2"] / 1000 - 0.1) < 0.04


def test_a_million_clients_with_as_many_samples_as_a_message_can_say_are_drawn_from() -> None:
    """Their sum is beyond 2^40, where a draw once ended the run."""
    weights = np.full(1_000_000, 2**32 - 1, dtype=np.int64)
    drawn = Stream(1, "clients").weighted_subset(weights, 2)
    assert drawn[0] < drawn[1] < 1_000_000


def test_more_samples_than_can_be_drawn_from_are_refused() -> None:
    config = RunConfig(clients=3, clients_per_round=1, sampling="examples")
    with pytest.raises(RunError, match=f"have {2**57} samples together: lower max_examples"):
        sample_clients(config, 1, {"0": 2**56, "1": 2**56})


def test_natural_order() -> None:
    assert sorted(["10", "9", "site-b", "1"], key=natural_order) == ["1", "9", "10", "site-b"]
