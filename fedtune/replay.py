"""From a ledger to the server's state: the snapshot of its last round, or every update of every round once more.

Both must agree, and each round must lead to the digest that was written when it was live: `verify` checks that, without
the base model and without a client. Whoever reads an update for a state, the live server too, does it with `read_update`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune import arrays, wire
from fedtune.algorithms import ALGORITHMS, Algorithm, State
from fedtune.algorithms.base import pool_number, shares
from fedtune.beside import is_reference
from fedtune.config import RunConfig
from fedtune.directions.base import F64, Floats
from fedtune.errors import (
    DamagedLedgerError,
    DirectionsError,
    FedtuneError,
    ForeignLedgerError,
    LedgerError,
    MalformedMessageError,
    NonFiniteError,
)
from fedtune.layout import Layout
from fedtune.ledger import Header, Ledger, Round, Snapshot
from fedtune.ledger_cells import settings_in
from fedtune.pieces import Buffer, pieces
from fedtune.wire import Status, Update


@dataclass(frozen=True)
class Rules:
    """What turns states into states: the settings, and the layout of the base model with its fingerprint."""

    config: RunConfig
    layout: Layout
    fingerprint: bytes

    @classmethod
    def of(cls, header: Header) -> Rules:
        """The rules of a ledger.

        Raises:
            DamagedLedgerError: no run can have its settings. ForeignLedgerError: they cannot be those of this program.
        """
        config = settings_in(header.used, "the header")
        layout = Layout.from_shapes(header.shapes, ALGORITHMS[config.algorithm].block_rule(config))
        rules = cls(config, layout, header.fingerprint)
        try:
            pool = rules.algorithm.pool(config, layout, 0)
        except DirectionsError as error:
            raise DamagedLedgerError(f"The header of the ledger is damaged ({error}) Restore it.", row="the header") from None
        if layout.digest != header.layout or pool.identity != header.pool:
            raise ForeignLedgerError("This program lays out the model or its directions in another way than the ledger's.")
        return rules

    @cached_property
    def algorithm(self) -> Algorithm:
        """Of the settings."""
        return ALGORITHMS[self.config.algorithm]

    @property
    def state_size(self) -> int:
        """Numbers in the coefficients of the open pool."""
        return self.layout.blocks * self.algorithm.pool_size(self.config, self.layout)

    @property
    def value_type(self) -> np.dtype[Any]:
        """Of the coefficients of the open pool."""
        return self.algorithm.value_type(self.config)

    def start(self) -> State:
        """State 0."""
        return self.algorithm.start(self.config, self.layout)

    def begin_round(self, state: State) -> State:
        """What the next round starts from."""
        return self.algorithm.begin_round(state, self.config, self.layout)

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """What the updates of a round lead to."""
        return self.algorithm.aggregate(state, updates, self.config, self.layout)

    def counts(self, state: State) -> npt.NDArray[np.int64]:
        """What every client is asked for in a round that starts from `state`: int64 [L] or empty (`Algorithm.counts`)."""
        return self.algorithm.counts(state, self.config, self.layout)

    def digest(self, state: State) -> bytes:
        """Names the model of a state."""
        return state.published(self.config.coefficient_bits).digest(self.fingerprint)

    def encoded(self, state: State, number: int) -> Iterator[bytes]:
        """Piece by piece: the model after round `number` as a complete instruction, which a client that joins now would get."""
        model = state.published(self.config.coefficient_bits)
        complete = wire.Instruction(
            round=number + 1,
            fingerprint=self.fingerprint,
            layout=self.layout.digest,
            digest=model.digest(self.fingerprint),
            held=0,
            pools=model.pools,
            draw_weights=self.algorithm.draw_weights(state),
            counts=self.counts(state).astype(np.uint16),
        )
        return wire.instruction_packed(complete, self.config.coefficient_bits)

    def closed(self, state: State, known: int = 0) -> list[bytes]:
        """The finished pools of a state, encoded, without the first `known`."""
        return [wire.encode_pool(pool, self.config.coefficient_bits) for pool in state.closed[known:]]


def read_update(
    rules: Rules, state: State, payload: Buffer, *, round: int, digest: bytes, client: str, others: Iterable[str] = ()
) -> Update:
    """The update of `client` in `payload`, to a round that started from `state`, whose digest is `digest`.

    Raises WireError, with the name of the one of `others` whose update it is instead.
    """
    longest = rules.algorithm.longest_update(rules.config, rules.layout)
    if len(payload) > longest:
        raise MalformedMessageError(f"The update has {len(payload)} bytes; at most {longest} were announced for this run.")
    counts = rules.counts(state)
    update = wire.decode_update(
        payload,
        kind=rules.algorithm.kind,
        round=round,
        digest=digest,
        client=client,
        others=others,
        max_steps=rules.config.client_steps,
        blocks=rules.layout.blocks,
        max_count=min(state.pool.size, 65535),
        bits=rules.config.scalar_bits,
        per_step=rules.config.directions_per_step,
        asked=counts if counts.size else None,
        parameters=rules.layout.numel,
    )
    if update.status == Status.FINISHED:
        rules.algorithm.check_update(update, rules.config, rules.layout)
    return update


# ---------------------------------------------------------------------------------------------------- snapshots

_KEPT = "statistics."
COUNTED = ("magnitude", "count", "norms")  # statistics that are sums of what is not below 0
LARGEST_VALUE = 1e60  # of a coefficient or a statistic: squares and sums of such are finite


Store = Callable[[Iterable[Buffer]], bytes]
"""What a column holds of the value of some parts: `Ledger.store`, or `b"".join` where nothing is large."""


def snapshot_of(state: State, round: int, store: Store = b"".join) -> Snapshot:
    """The open pool and the statistics of `state` after round `round`, as arrays with their types (`fedtune.arrays`)."""
    kept = {"values": state.values, **{f"{_KEPT}{name}": array for name, array in state.statistics.items()}}
    return Snapshot(round, state.round, store(arrays.written(kept)))


def restore(ledger: Ledger, rules: Rules) -> State:
    """The state after the last round, from the snapshot and the finished pools. Raises DamagedLedgerError."""
    snapshot, finished = checked_snapshot(ledger, rules), ledger.pools()
    config, blocks, last = rules.config, rules.layout.blocks, ledger.round(ledger.last)
    pools = [rules.algorithm.pool(config, rules.layout, number) for number in range(len(finished) + 1)]
    try:
        if snapshot.round != last.number or snapshot.moves > snapshot.round:
            raise ValueError(f"it is of round {snapshot.round} with {snapshot.moves} moves")
        if len(finished) not in {pool_number(config, max(1, moves)) for moves in (snapshot.moves, snapshot.moves + 1)}:
            raise ValueError(f"{len(finished)} pools cannot be finished after {snapshot.moves} moves")
        closed = [
            wire.decode_pool(data, pool, blocks, config.coefficient_bits) for data, pool in zip(finished, pools, strict=False)
        ]
        values, statistics = _arrays(ledger.value(snapshot.arrays), rules)
        state = State(snapshot.moves, tuple(closed), pools[-1], values, statistics)
        digest = rules.digest(state)
    except DamagedLedgerError:
        raise
    except (ValueError, FedtuneError) as error:
        raise DamagedLedgerError(
            f"The snapshot in '{ledger.path}' is damaged ({error}): restore it.", row="snapshot"
        ) from error
    if digest != last.state:
        raise DamagedLedgerError(
            f"The snapshot in '{ledger.path}' does not lead to the digest of round {last.number}: restore it.", row="snapshot"
        )
    return state


def checked_snapshot(ledger: Ledger, rules: Rules) -> Snapshot:
    """The snapshot, which is as large as the state that the settings speak of: so that no larger one is ever made.

    Raises:
        DamagedLedgerError: it is smaller.
    """
    snapshot = ledger.snapshot
    if len(ledger.value(snapshot.arrays, hashed=False)) < rules.value_type.itemsize * rules.state_size:
        raise bad(ledger, "the snapshot", f"it has no room for the {rules.state_size:,} coefficients that the header speaks of")
    return snapshot


def _arrays(data: Buffer, rules: Rules) -> tuple[Floats, dict[str, F64]]:
    """The values and the statistics in a snapshot, which must be those of the algorithm. Raises ValueError."""
    blocks, size = rules.layout.blocks, rules.algorithm.pool_size(rules.config, rules.layout)
    kept = {f"{_KEPT}{name}": array.shape for name, array in rules.algorithm.statistics(blocks, size).items()}
    expected = {"values": (blocks, size), **kept}
    found = arrays.read(data)
    if {name: array.shape for name, array in found.items()} != expected:
        raise ValueError("its arrays are not those of the algorithm")
    for name, array in found.items():
        if array.dtype != (rules.value_type if name == "values" else np.float64):
            raise ValueError(f"{name} has numbers of another type")
        largest = min(LARGEST_VALUE, float(np.finfo(array.dtype).max))
        for piece in pieces(array.reshape(-1)):
            if not (np.abs(piece) <= largest).all():
                raise ValueError(f"{name} holds something else than finite numbers")
            if name.removeprefix(_KEPT) in COUNTED and (piece < 0).any():
                raise ValueError(f"{name} holds a number below 0")
    values = found.pop("values")
    return values, {name.removeprefix(_KEPT): np.array(array, dtype=np.float64) for name, array in found.items()}


# ---------------------------------------------------------------------------------------------------- replay


@dataclass(frozen=True)
class Replayed:
    """A round of the ledger and the state that its updates lead to."""

    row: Round
    state: State


def updates_kept(ledger: Ledger) -> bool:
    """Whether all updates are there to be replayed: no large one was removed by `keep_updates = false`."""
    asked = [ledger.header.used, *(event.detail["settings"] for event in ledger.events("resume"))]
    if all(settings.get("keep_updates", True) for settings in asked):
        return True
    return not any(is_reference(used.payload) for row in ledger.rounds() for used in ledger.updates(row.number))


def replay(ledger: Ledger, rules: Rules) -> Iterator[Replayed]:
    """Every round from 0, from its updates alone.

    Raises:
        LedgerError: they were not kept.
        DamagedLedgerError: a round that does not lead to its digest, whose updates cannot be read or are not those of the
            clients that it names, or whose weights are others.
    """
    checked_snapshot(ledger, rules)
    if not updates_kept(ledger):
        raise LedgerError(
            f"The updates in '{ledger.path}' were not kept (keep_updates = false): of its models only the last one is there.",
            path=str(ledger.path),
        )
    state = rules.start()
    for row in ledger.rounds():
        try:
            if row.number:
                state = _moved(ledger, rules, rules.begin_round(state), row)
            digest = rules.digest(state)
        except NonFiniteError as error:
            raise bad(ledger, f"round {row.number}", f"its updates lead to no model ({error})") from error
        if digest != row.state:
            raise bad(ledger, f"round {row.number}", "its updates lead to another digest")
        yield Replayed(row, state)


def _moved(ledger: Ledger, rules: Rules, state: State, row: Round) -> State:
    used = ledger.updates(row.number)
    if {update.client for update in used} != set(row.clients) - set(row.refused):
        raise bad(ledger, f"round {row.number}", "its updates are not those of its clients")
    digest = rules.digest(state)
    try:
        read_one = partial(read_update, rules, state, round=row.number, digest=digest)
        read = {u.client: read_one(ledger.value(u.payload), client=u.client) for u in used}
    except FedtuneError as error:
        raise bad(ledger, f"round {row.number}", f"an update cannot be read ({error})") from error
    if {update.client: update.share for update in used} != shares(read, rules.config):
        raise bad(ledger, f"round {row.number}", "the weights are not those of its updates")
    return rules.aggregate(state, read) if read else state


def state_after(ledger: Ledger, rules: Rules, number: int) -> State:
    """The state after round `number`: the snapshot's if it is the last round, else by replay."""
    if number == ledger.last:
        return restore(ledger, rules)
    found = next((replayed.state for replayed in itertools.islice(replay(ledger, rules), number, None)), None)
    if found is None:
        raise bad(ledger, f"round {number}", "it is not there")
    return found


def bad(ledger: Ledger, row: str, why: str) -> DamagedLedgerError:
    """The error for the first bad row."""
    return DamagedLedgerError(
        f"'{ledger.path}' is not as it was written, from {row} on: {why}. Restore it from a copy.", row=row, why=why
    )
