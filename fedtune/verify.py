"""Whether a ledger is what was written: its chains, then every update of the run once more, then what lies beside them.

Updates that were not kept (`keep_updates = false`) leave their digests in the chains, and cannot be replayed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from fedtune.beside import named
from fedtune.chain import link
from fedtune.errors import DamagedLedgerError
from fedtune.foreign import for_screen
from fedtune.ledger import START, Ledger, updates_digest
from fedtune.replay import Replayed, Rules, bad, replay, restore, snapshot_of, updates_kept

_CHAINED = 2  # columns at the end of a row: the digest before, and its own


@dataclass(frozen=True)
class Verified:
    """What was checked: numbers of rounds (without 0), updates, events and finished pools, and the digest of the model.

    `replayed`: the updates lead to these digests. Where they were not kept, only the last state was held against its own.
    """

    rounds: int
    updates: int
    events: int
    pools: int
    digest: str
    replayed: bool


def verify(ledger: Ledger) -> Verified:
    """Check everything that a ledger holds.

    Raises:
        DamagedLedgerError: the first bad row is `facts["row"]`.
        ForeignLedgerError: the ledger cannot be replayed by this program.
    """
    with ledger.at_one_moment():
        updates = check_chains(ledger)
        damage = ledger.damage()
        if damage:
            raise bad(ledger, "the file", f"SQLite finds damage ({for_screen(damage)})")
        rules = Rules.of(ledger.header)
        ledger.value(ledger.snapshot.arrays)  # has its digest
        replayed = updates_kept(ledger)
        last = _replayed(ledger, rules) if replayed else Replayed(ledger.round(ledger.last), restore(ledger, rules))
        if replayed:
            _derived(ledger, rules, last)
        events = sum(1 for _ in ledger.events())
    return Verified(last.row.number, updates, events, len(last.state.closed), last.row.state.hex(), replayed)


def check_chains(ledger: Ledger) -> int:
    """Check every digest, without a replay; returns the number of updates. Raises DamagedLedgerError."""
    head = _header(ledger)
    heads = {table: _chain(ledger, table, head) for table in ("rounds", "events")}
    updates = _updates(ledger)
    _snapshot_row(ledger, heads)
    return updates


def _header(ledger: Ledger) -> bytes:
    """The digest of the header, where both chains begin."""
    rows = list(itertools.islice(ledger.rows("header"), 2))
    if len(rows) != 1 or link(START, "header", rows[0][1:-1]) != rows[0][-1]:
        raise bad(ledger, "the header", "its columns do not have its digest")
    return bytes(rows[0][-1])


def _chain(ledger: Ledger, table: str, head: bytes) -> bytes:
    """Follow a chain to its end; returns the last digest."""
    name = table.removesuffix("s")
    for expected, row in enumerate(ledger.rows(table), start=0 if table == "rounds" else 1):
        if row[0] != expected:
            raise bad(ledger, f"{name} {expected}", f"the next row is {for_screen(str(row[0]), 40)}")
        if row[-2] != head:
            raise bad(ledger, f"{name} {expected}", "it does not follow the row before it")
        if link(head, table, row[:-_CHAINED]) != row[-1]:
            raise bad(ledger, f"{name} {expected}", "its columns do not have its digest")
        head = bytes(row[-1])
    return head


def _updates(ledger: Ledger) -> int:
    """Compare the updates with the digest that each round has of its own; returns how many there are."""
    count = 0
    for row in ledger.rows("rounds"):
        updates = ledger.updates(row[0])
        if updates_digest(row[0], updates) != row[-3]:
            raise bad(ledger, f"round {row[0]}", "its updates are not those that it was written with")
        count += len(updates)
    if sum(1 for _ in ledger.rows("updates")) != count:
        raise bad(ledger, "the updates", "some belong to no round")
    return count


def _snapshot_row(ledger: Ledger, heads: dict[str, bytes]) -> None:
    rows = list(itertools.islice(ledger.rows("snapshot"), 2))
    if len(rows) != 1 or link(START, "snapshot", rows[0][1:-1]) != rows[0][-1]:
        raise bad(ledger, "the snapshot", "its columns do not have its digest")
    for column, table in ((4, "rounds"), (5, "events")):
        if rows[0][column] != heads[table]:
            raise bad(ledger, f"the end of the {table}", "rows are missing or were added after the last one")


def _replayed(ledger: Ledger, rules: Rules) -> Replayed:
    last = None
    for replayed in replay(ledger, rules):
        last = replayed
    if last is None:
        raise DamagedLedgerError(f"'{ledger.path}' has no rounds: restore it from a copy.", row="round 0")
    return last


def _derived(ledger: Ledger, rules: Rules, last: Replayed) -> None:
    """The snapshot and the finished pools are those of the replayed state."""
    for number, (stored, found) in enumerate(zip(ledger.rows("pools"), rules.closed(last.state), strict=False)):
        if stored != (number, named([found])):
            raise bad(ledger, f"pool {number}", "the updates lead to other coefficients")
    if len(ledger.pools()) != len(last.state.closed):
        raise bad(ledger, "the pools", f"there are {len(ledger.pools())}, the updates lead to {len(last.state.closed)}")
    if ledger.snapshot != snapshot_of(last.state, last.row.number, named):
        raise bad(ledger, "the snapshot", "the updates lead to other numbers")
