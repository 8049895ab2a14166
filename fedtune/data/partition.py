"""Who has which rows: the split of the training rows over clients, drawn from the named stream (seed, "partition").

Each rule gives every row to exactly one client and ends after a bounded number of attempts. Rows are numbers in the data
file; categories are looked up by row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.config import RunConfig
from fedtune.errors import DataError, EmptyClientError
from fedtune.seeds import F64, I64, Stream

ATTEMPTS = 100
"""Draws of the Dirichlet split before it is given up: with 200 clients of Dolly-15K the first few suffice."""

Clients = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Partition:
    """Row numbers, ascending: of each client, and held out for evaluation.

    `heldout_source` is the file that the held-out rows are in; "" if it is the training file.
    """

    clients: Clients
    heldout: tuple[int, ...]
    heldout_source: str = ""

    def as_json(self) -> dict[str, object]:
        """The partition as JSON types, for the run folder."""
        return {
            "clients": [list(rows) for rows in self.clients],
            "heldout": list(self.heldout),
            "heldout_source": self.heldout_source,
        }


def split_heldout(categories: Mapping[int, str], config: RunConfig) -> tuple[list[int], list[int]]:
    """(training rows, held-out rows) of one file, by `holdout_category` or at random by `holdout`.

    Where each client has a category of its own, a random choice leaves one row of every category to train on.

    Args:
        categories: usable row -> category.

    Raises:
        DataError: there is no such category.
        EmptyClientError: nothing is held out, or nothing is left.
    """
    rows = sorted(categories)
    if config.holdout_category:
        heldout = [row for row in rows if categories[row] == config.holdout_category]
        if not heldout:
            there = sorted({category or "(none)" for category in categories.values()})
            raise DataError(
                f"No usable row has the category '{config.holdout_category}' (holdout_category); "
                f"those there are: {', '.join(there)}.",
                category=config.holdout_category,
                categories=tuple(there),
            )
    else:
        size = max(1, round(config.holdout * len(rows))) if config.holdout > 0 and rows else 0
        heldout = [rows[i] for i in Stream(config.seed, "partition", "heldout").subset(len(rows), size)]
        if config.partition == "column":  # how many clients there can be must not depend on the seed
            heldout = _leaving_one_of_each(heldout, categories)
            if size and not heldout:
                raise EmptyClientError(
                    'Only rows that are the last of their category were drawn for evaluation, and partition = "column" keeps '
                    "those: raise holdout, or use holdout_category or holdout_file."
                )
    chosen = set(heldout)
    training = [row for row in rows if row not in chosen]
    if not heldout:
        raise EmptyClientError("No row is held out for evaluation: set holdout above 0, holdout_category or holdout_file.")
    if not training:
        raise EmptyClientError("All usable rows are held out and none is left to train on: lower holdout or give more rows.")
    return training, heldout


def _leaving_one_of_each(heldout: Sequence[int], categories: Mapping[int, str]) -> list[int]:
    """`heldout` without the first row of each category of which nothing else would be left to train on."""
    there = Counter(categories.values())
    emptied = {name for name, count in Counter(categories[row] for row in heldout).items() if count == there[name]}
    spared = {min(row for row in heldout if categories[row] == name) for name in emptied}
    return [row for row in heldout if row not in spared]


def partition(categories: Mapping[int, str], config: RunConfig) -> Clients:
    """The training rows of each of `config.clients` clients, by the rule `config.partition`.

    Args:
        categories: training row -> category ("" for none).

    Raises:
        EmptyClientError: a client would have fewer than `config.min_samples` rows.
        DataError: the rule needs categories and there are none.
    """
    rows = sorted(categories)
    needed = config.clients * config.min_samples
    if len(rows) < needed:
        raise EmptyClientError(
            f"{config.clients} clients with at least {config.min_samples} samples need {needed} usable training rows, "
            f"but there are {len(rows)}: lower clients or min_samples.",
            rows=len(rows),
            needed=needed,
        )
    if config.partition in ("dirichlet", "column") and not any(categories.values()):
        raise DataError(
            f"partition = \"{config.partition}\" goes by '{config.category_column}', which is empty in every row: "
            'set category_column, or partition = "iid".'
        )
    if config.partition == "column":
        clients = by_column(categories, config.clients)
    elif config.partition == "dirichlet":
        clients = dirichlet(categories, config)
    elif config.partition == "quantity":
        clients = quantity(rows, config)
    else:
        order = Stream(config.seed, "partition", "iid").permutation(len(rows))
        clients = tuple(tuple(sorted(rows[i] for i in order[client :: config.clients])) for client in range(config.clients))
    _check_sizes(clients, config)
    return clients


def by_column(categories: Mapping[int, str], clients: int) -> Clients:
    """One category a client, in alphabetical order; if there are more categories than clients, they are dealt in turn.

    Raises:
        EmptyClientError: there are fewer categories than clients.
    """
    names = sorted(set(categories.values()))
    if len(names) < clients:
        raise EmptyClientError(
            f'partition = "column" gives each client a category of its own, and there are {len(names)} for {clients} clients: '
            f"set clients = {len(names)}.",
            categories=len(names),
            clients=clients,
        )
    owner = {name: index % clients for index, name in enumerate(names)}
    return _gather({row: owner[category] for row, category in categories.items()}, clients)


def dirichlet(categories: Mapping[int, str], config: RunConfig) -> Clients:
    """Label skew: the rows of each category are divided by proportions drawn from Dirichlet(dirichlet_alpha).

    A client that already has its fair share gets no more of the next categories, and the draw is repeated until every
    client has `min_samples`. Source: Hsu, Qi, Brown, arXiv 1909.06335, in the balanced form that FedKSeed's code uses.

    Raises:
        EmptyClientError: ATTEMPTS draws left some client with fewer than `min_samples` rows.
    """
    by_name: dict[str, list[int]] = {}
    for row in sorted(categories):
        by_name.setdefault(categories[row], []).append(row)
    for attempt in range(ATTEMPTS):
        stream = Stream(config.seed, "partition", "dirichlet", attempt)
        owners = _draw_owners([by_name[name] for name in sorted(by_name)], config.clients, config.dirichlet_alpha, stream)
        clients = _gather(owners, config.clients)
        if min(map(len, clients)) >= config.min_samples:
            return clients
    raise EmptyClientError(
        f"No Dirichlet split in {ATTEMPTS} draws gives each of {config.clients} clients {config.min_samples} samples: "
        f"raise dirichlet_alpha (now {config.dirichlet_alpha}), or lower min_samples or clients.",
        attempts=ATTEMPTS,
    )


def _draw_owners(groups: Sequence[Sequence[int]], clients: int, alpha: float, stream: Stream) -> dict[int, int]:
    """row -> client for every row of every group (the rows of one category)."""
    fair_share = sum(map(len, groups)) / clients
    sizes = np.zeros(clients, dtype=np.int64)
    owners: dict[int, int] = {}
    for rows in groups:
        drawn = stream.dirichlet(alpha, clients)
        open_to_more = np.where(sizes < fair_share, drawn, 0.0)
        shares = open_to_more if open_to_more.any() else drawn
        counts = apportion(shares, len(rows))
        shuffled = stream.permutation(len(rows))
        for index, client in zip(shuffled, np.repeat(np.arange(clients), counts), strict=True):
            owners[rows[index]] = int(client)
        sizes += counts
    return owners


def quantity(rows: Sequence[int], config: RunConfig) -> Clients:
    """Quantity skew: `min_samples` rows for each client, the rest by proportions drawn from Dirichlet(dirichlet_alpha)."""
    stream = Stream(config.seed, "partition", "quantity")
    spare = len(rows) - config.clients * config.min_samples
    counts = config.min_samples + apportion(stream.dirichlet(config.dirichlet_alpha, config.clients), spare)
    owners = np.repeat(np.arange(config.clients), counts)
    order = stream.permutation(len(rows))
    return _gather({rows[index]: int(owner) for index, owner in zip(order, owners, strict=True)}, config.clients)


def apportion(shares: F64, total: int) -> I64:
    """int64 [n] summing to `total`, in proportion to `shares`: rounded down, the rest to the largest remainders."""
    exact = shares / math.fsum(shares.tolist()) * total
    counts: I64 = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def _gather(owners: Mapping[int, int], clients: int) -> Clients:
    rows: list[list[int]] = [[] for _ in range(clients)]
    for row in sorted(owners):
        rows[owners[row]].append(row)
    return tuple(tuple(own) for own in rows)


def _check_sizes(clients: Clients, config: RunConfig) -> None:
    smallest = min(range(len(clients)), key=lambda client: len(clients[client]))
    if len(clients[smallest]) < config.min_samples:
        raise EmptyClientError(
            f"Client {smallest} has {len(clients[smallest])} usable samples, fewer than min_samples = {config.min_samples}: "
            "lower min_samples, or use fewer clients or another partition.",
            client=smallest,
            samples=len(clients[smallest]),
        )
