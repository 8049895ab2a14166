"""The rows of a ledger as records: how each is written as columns, and read from them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fedtune.chain import Value, as_text
from fedtune.ledger_cells import MOST_ROUNDS, Cells
from fedtune.traffic import Traffic, as_lists, total


@dataclass(frozen=True)
class Header:
    """What a run is, written once.

    Attributes:
        created: date and time.
        versions: of the libraries that results depend on.
        asked, used: settings as given, and all of them.
        fingerprint, layout, pool: 16, 16 and 8 bytes: base model, order of its parameters, first pool of directions.
        shapes: name and shape of each trainable tensor in order, so that a ledger can be replayed without the model.
        partition: 32 bytes over partition.json.
    """

    created: str
    versions: Mapping[str, str]
    asked: Mapping[str, Any]
    used: Mapping[str, Any]
    fingerprint: bytes
    layout: bytes
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    partition: bytes
    pool: bytes

    def columns(self) -> tuple[Value, ...]:
        """As stored, without id and digest."""
        texts = (self.created, as_text(self.versions), as_text(self.asked), as_text(self.used))
        return (*texts, self.fingerprint, self.layout, as_text(self.shapes), self.partition, self.pool)

    @classmethod
    def of(cls, cells: Cells) -> Self:
        """From the columns of its row. Raises DamagedLedgerError."""
        return cls(
            created=cells.text("created"),
            versions=cells.texts("versions"),
            asked=cells.mapping("asked"),
            used=cells.mapping("used"),
            fingerprint=cells.blob("fingerprint", 16),
            layout=cells.blob("layout", 16),
            shapes=cells.shapes("shapes"),
            partition=cells.blob("partition", 32),
            pool=cells.blob("pool", 8),
        )


@dataclass(frozen=True)
class Used:
    """An update that a round used: its weight among those of the round, and its payload as the row has it (`Ledger.store`)."""

    client: str
    share: float
    payload: bytes

    @classmethod
    def of(cls, cells: Cells) -> Self:
        """From the columns of its row. Raises DamagedLedgerError."""
        return cls(cells.text("client"), cells.real("share"), cells.blob("payload"))


@dataclass(frozen=True)
class Round:
    """One round. `attempt` counts from 1; `traffic` is by client; `seconds` are of its phases, and `cpu_seconds` those of
    the server's process, which holds the clients too where they are simulated in process; `elapsed` is of the run so far;
    `state` is the digest of the model after it. Clients that were asked and not refused are those whose updates were used.
    """

    number: int
    attempt: int = 1
    clients: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    train_loss: float | None = None
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    cpu_seconds: Mapping[str, float] = field(default_factory=dict)
    elapsed: float = 0.0
    state: bytes = b""

    def columns(self) -> tuple[Value, ...]:
        """As stored, without what chains it."""
        who = (as_text(list(self.clients)), as_text(self.refused))
        costs = (as_text(as_lists(self.traffic)), as_text(self.seconds), as_text(self.cpu_seconds))
        return (self.number, self.attempt, *who, self.train_loss, *costs, self.elapsed, self.state)

    @property
    def total(self) -> Traffic:
        """Of all clients."""
        return total(self.traffic.values())

    @classmethod
    def of(cls, cells: Cells) -> Self:
        """From the columns of its row. Raises DamagedLedgerError."""
        return cls(
            number=cells.whole("number", most=MOST_ROUNDS),
            attempt=cells.whole("attempt"),
            clients=cells.names("clients"),
            refused=cells.texts("refused"),
            train_loss=cells.real_or_none("train_loss"),
            traffic=cells.traffic("traffic"),
            seconds=cells.numbers("seconds"),
            cpu_seconds=cells.numbers("cpu_seconds"),
            elapsed=cells.real("elapsed"),
            state=cells.blob("state", 16),
        )


@dataclass(frozen=True)
class Happened:
    """An event after round `round`; `kind` says what is in `detail` (docs/ledger.md)."""

    number: int
    round: int
    kind: str
    detail: Mapping[str, Any]
    elapsed: float

    def columns(self) -> tuple[Value, ...]:
        """As stored, without what chains it."""
        return (self.number, self.round, self.kind, as_text(self.detail), self.elapsed)

    @classmethod
    def of(cls, cells: Cells) -> Self:
        """From the columns of its row. Raises DamagedLedgerError."""
        kind = cells.text("kind")
        after = cells.whole("round", most=MOST_ROUNDS)
        return cls(cells.whole("number", 1), after, kind, cells.detail("detail", kind), cells.real("elapsed"))


@dataclass(frozen=True)
class Snapshot:
    """The state after round `round`: `moves` rounds changed it; `arrays`, its numbers, as the row has them (`Ledger.store`)."""

    round: int
    moves: int
    arrays: bytes

    @classmethod
    def of(cls, cells: Cells) -> Self:
        """From the columns of its row. Raises DamagedLedgerError."""
        round, moves = cells.whole("round", most=MOST_ROUNDS), cells.whole("moves", most=MOST_ROUNDS)
        return cls(round, moves, cells.blob("arrays"))
