"""Laws of every partition: each row has one owner, no class is lost, nobody is empty, the same draw everywhere."""

from __future__ import annotations

import hashlib
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import RunConfig
from fedtune.data.partition import Partition, apportion, partition, split_heldout
from fedtune.errors import DataError, EmptyClientError

RULES = ("iid", "dirichlet", "column", "quantity")


def labelled(rows: int, classes: int = 4) -> dict[int, str]:
    """Rows 3, 5, 7, ... (row numbers have gaps where rows were dropped) in classes of falling size."""
    return {2 * row + 3: f"class {int(classes * (row / rows) ** 2)}" for row in range(rows)}


def config(rule: str, **changes: object) -> RunConfig:
    return RunConfig.from_mapping({"partition": rule, "clients": 4, "client_fraction": 1.0, **changes})


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(150, 300), seed=st.integers(0, 2**62), alpha=st.sampled_from([0.3, 1.0, 100.0]))
def test_every_row_has_exactly_one_owner_and_nobody_is_short(rule: str, rows: int, seed: int, alpha: float) -> None:
    categories = labelled(rows)
    clients = partition(categories, config(rule, seed=seed, dirichlet_alpha=alpha))
    assert sorted(row for own in clients for row in own) == sorted(categories)
    assert min(map(len, clients)) >= 10
    assert all(list(own) == sorted(own) for own in clients)


@pytest.mark.parametrize("rule", RULES)
def test_the_same_seed_gives_the_same_partition_and_another_seed_another(rule: str) -> None:
    first, again, other = (partition(labelled(200), config(rule, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert (first == other) == (rule == "column")


@pytest.mark.parametrize(
    ("rule", "digest"),
    [("iid", "fc0b7c4aa40a"), ("dirichlet", "08267a6d4ba1"), ("column", "cfc26d4449c8"), ("quantity", "a2214468183c")],
)
def test_partitions_of_seed_0_are_these_on_every_machine(rule: str, digest: str) -> None:
    clients = partition(labelled(200), config(rule))
    assert hashlib.sha256(json.dumps(clients).encode()).hexdigest()[:12] == digest


def test_iid_shares_differ_by_one_at_most() -> None:
    sizes = [len(own) for own in partition(labelled(203), config("iid"))]
    assert sorted(sizes) == [50, 51, 51, 51]


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    categories = labelled(2000)

    def skew(alpha: float) -> float:
        """Mean over clients of the distance between the client's class shares and those of all rows."""
        clients = partition(categories, config("dirichlet", dirichlet_alpha=alpha))
        names = sorted(set(categories.values()))
        overall = np.array([list(categories.values()).count(name) for name in names]) / len(categories)
        shares = [np.array([sum(categories[row] == name for row in own) for name in names]) / len(own) for own in clients]
        return float(np.mean([np.abs(share - overall).sum() for share in shares]))

    assert skew(0.1) > 0.6
    assert skew(1000.0) < 0.15


def test_a_small_alpha_skews_quantities() -> None:
    def sizes(alpha: float) -> list[int]:
        return [len(own) for own in partition(labelled(1000), config("quantity", dirichlet_alpha=alpha, min_samples=5))]

    assert max(sizes(0.2)) > 3 * min(sizes(0.2))
    assert max(sizes(10_000.0)) < 1.1 * min(sizes(10_000.0))


def test_column_gives_each_client_its_own_value() -> None:
    categories = labelled(200)
    clients = partition(categories, config("column"))
    assert [{categories[row] for row in own} for own in clients] == [{f"class {index}"} for index in range(4)]


def test_column_deals_more_values_than_clients_in_turn() -> None:
    categories = labelled(300, classes=6)
    clients = partition(categories, config("column"))
    assert [sorted({categories[row] for row in own}) for own in clients] == [
        ["class 0", "class 4"],
        ["class 1", "class 5"],
        ["class 2"],
        ["class 3"],
    ]


def test_column_needs_a_value_for_every_client() -> None:
    with pytest.raises(EmptyClientError, match=r"there are 3 for 4 clients: set clients = 3\."):
        partition(labelled(200, classes=3), config("column"))


def test_column_checks_the_smallest_client() -> None:
    categories = {row: "rare" if row < 3 else f"class {row % 3}" for row in range(100)}
    with pytest.raises(
        EmptyClientError, match=r"Client 3 has 3 usable samples, fewer than min_samples = 10: lower min_samples"
    ):
        partition(categories, config("column"))


@pytest.mark.parametrize("rule", RULES)
def test_too_few_rows_are_refused_before_any_draw(rule: str) -> None:
    with pytest.raises(
        EmptyClientError, match=r"4 clients with at least 10 samples need 40 usable training rows, but there are 39"
    ):
        partition(labelled(39), config(rule))


def test_an_impossible_dirichlet_split_ends_with_the_fix() -> None:
    started = time.monotonic()
    with pytest.raises(
        EmptyClientError, match=r"No Dirichlet split in 100 draws gives each of 4 clients 10 samples: raise dirichlet_alpha"
    ):
        partition(labelled(41, classes=1), config("dirichlet", dirichlet_alpha=0.01))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("rule", ["dirichlet", "column"])
def test_rules_by_category_refuse_data_without_any(rule: str) -> None:
    with pytest.raises(DataError, match=r"goes by 'category', which is empty in every row: set category_column"):
        partition(dict.fromkeys(range(100), ""), config(rule))


def test_rows_without_category_are_a_class_of_their_own() -> None:
    categories = {row: "" if row % 2 else "named" for row in range(200)}
    clients = partition(categories, config("dirichlet"))
    assert sum(map(len, clients)) == 200


def test_heldout_share_is_a_random_subset_of_that_size() -> None:
    training, heldout = split_heldout(labelled(200), config("iid", holdout=0.1))
    assert len(heldout) == 20
    assert sorted(training + heldout) == sorted(labelled(200))
    assert heldout != split_heldout(labelled(200), config("iid", holdout=0.1, seed=1))[1]


def test_how_many_clients_by_column_there_can_be_does_not_depend_on_what_is_held_out() -> None:
    categories = {**labelled(60), 1001: "alone", 1003: "pair", 1005: "pair"}
    for seed in range(40):
        training, heldout = split_heldout(categories, config("column", holdout=0.5, seed=seed))
        assert {categories[row] for row in training} == set(categories.values())
        anyhow = split_heldout(categories, config("iid", holdout=0.5, seed=seed))[1]
        assert set(heldout) <= set(anyhow)  # spared rows are the only difference
        assert len(anyhow) - len(heldout) <= 2
        assert 1001 not in heldout


def test_a_holdout_of_rows_without_others_of_their_category_says_so() -> None:
    with pytest.raises(EmptyClientError, match=r"the last of their category .* raise holdout, or use holdout_category"):
        split_heldout({row: f"class {row}" for row in range(20)}, config("column", holdout=0.2))


def test_heldout_category_is_held_out_whole() -> None:
    categories = labelled(200)
    training, heldout = split_heldout(categories, config("iid", holdout_category="class 2"))
    assert {categories[row] for row in heldout} == {"class 2"}
    assert "class 2" not in {categories[row] for row in training}


def test_an_unknown_heldout_category_lists_those_there_are() -> None:
    categories = {**labelled(100), 999: ""}
    with pytest.raises(
        DataError, match=r"'class 9' \(holdout_category\); those there are: \(none\), class 0, class 1, class 2, class 3"
    ):
        split_heldout(categories, config("iid", holdout_category="class 9"))


def test_empty_sides_of_the_holdout_are_refused() -> None:
    with pytest.raises(EmptyClientError, match=r"No row is held out for evaluation: set holdout above 0"):
        split_heldout(labelled(100), config("iid", holdout=0.0))
    with pytest.raises(EmptyClientError, match=r"All usable rows are held out and none is left to train on"):
        split_heldout(labelled(100, classes=1), config("iid", holdout_category="class 0"))


@given(shares=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20), total=st.integers(0, 1000))
def test_apportionment_is_exact_and_within_one_of_the_share(shares: list[float], total: int) -> None:
    counts = apportion(np.array(shares), total)
    assert counts.sum() == total
    assert np.all(np.abs(counts - np.array(shares) / np.sum(shares) * total) < 1.0 + 1e-9)


def test_a_partition_is_json() -> None:
    clients = partition(labelled(100), config("iid"))
    stored = json.loads(json.dumps(Partition(clients, (1, 2), "eval.jsonl").as_json()))
    assert stored == {"clients": [list(own) for own in clients], "heldout": [1, 2], "heldout_source": "eval.jsonl"}
