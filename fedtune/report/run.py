"""A run folder as a report needs it: whatever is there is read, what is not is left out, what is damaged is said.

Works for a run that is finished, goes on, was stopped, died or failed, and for files with keys that this version does not
know or lacks. Only a folder that is no run folder is refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedtune.beside import size_of
from fedtune.control import said
from fedtune.divergence import LOSSES, Divergence, first_divergence
from fedtune.errors import FedtuneError
from fedtune.ledger import Ledger
from fedtune.report.table import measured
from fedtune.run_folder import CONFIG, PARTITION, SUMMARY, VERSIONS, RunFolder

T = TypeVar("T")
MOST_DIGITS = 7  # of a round
LONGEST_PHASE = 40  # characters of a name
MOST_PHASES = 20
BOOKKEEPING = ("evaluation", "keys")  # events of the ledger that the curves show already, or that are for the server alone


@dataclass(frozen=True)
class Client:
    """What one client gave.

    Attributes:
        samples: that it has; None where the folder does not say.
        asked, used: rounds that asked it, and that used its update; `reasons` says why the others did not.
        share: its weight in the model's change, as a share of all used updates (0 to 1); None without a ledger.
        bytes_up: payload of its used updates; None without a ledger.
    """

    id: str
    samples: int | None
    asked: int
    used: int
    reasons: Mapping[str, int]
    share: float | None
    bytes_up: int | None


@dataclass(frozen=True)
class Answer:
    """One held-out sample; `prompt`, `expected` and `category` are "" in folders that do not have them."""

    prompt: str
    expected: str
    before: str | None
    after: str | None
    category: str = ""


@dataclass(frozen=True)
class Run:
    """One run. `problems` are files that could not be used, one sentence each."""

    path: Path
    doing: str
    error: str
    used: Mapping[str, Any]
    versions: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    clients: Sequence[Client]
    answers: Sequence[Answer]
    answered: tuple[int | None, int | None]
    events: Sequence[tuple[int, str, Mapping[str, Any]]]
    digests: Mapping[str, str]
    problems: Sequence[str]

    def values(self, key: str) -> list[tuple[int, float]]:
        """(round, value) of each row that has a finite number under `key`."""
        pairs = [(int(measured(row.get("round")) or 0), measured(row.get(key))) for row in self.rows]
        return [(number, value) for number, value in pairs if value is not None]

    def total(self, key: str) -> int:
        """The sum of a count over all rounds."""
        return int(sum(value for _, value in self.values(key)))

    def trained(self) -> list[Mapping[str, Any]]:
        """The rows without that of the base model."""
        return [row for row in self.rows if measured(row.get("round"))]

    @property
    def divergence(self) -> Divergence | None:
        """What the run warned of."""
        rows = [
            {
                "round": int(measured(row.get("round")) or 0),
                **{key: measured(row.get(key)) for key in LOSSES},
                "seconds": phases(row),
            }
            for row in self.rows
        ]
        return first_divergence(rows)

    @property
    def rounds(self) -> tuple[int, int]:
        """Finished, and asked for."""
        return len(self.trained()), int(measured(self.used.get("rounds")) or len(self.trained()))

    @property
    def seconds(self) -> float:
        """Of the whole run where it says so, else of the phases of its rounds."""
        return measured(self.summary.get("seconds")) or sum(sum(phases(row).values()) for row in self.rows)

    @property
    def algorithm(self) -> str:
        """As in the settings."""
        return str(self.used.get("algorithm", "unknown algorithm"))

    @property
    def digest(self) -> str:
        """Of the model after the last finished round."""
        return str(self.rows[-1].get("digest", "")) if self.rows else ""


@dataclass
class _Reader:
    folder: RunFolder
    problems: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[[], T], otherwise: T) -> T:
        """What `read` returns; `otherwise` and a noted problem where the file is damaged."""
        try:
            return read()
        except FedtuneError as error:
            self.problems.append(str(error))
        return otherwise

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A JSON object of the folder; {} where there is none."""
        if not os.path.lexists(self.folder.path / name):
            return {}
        return self.attempt(lambda: self.folder.read_object(name), {})


def read_run(path: Path) -> Run:
    """Read the run folder at `path`. Raises RunFolderError if it is none."""
    reader = _Reader(RunFolder.open(path))
    rows: list[dict[str, Any]] = reader.attempt(reader.folder.read_metrics, [])
    config, summary = reader.mapping(CONFIG), reader.mapping(SUMMARY)
    kept = reader.attempt(lambda: _ledger(path), _Kept())
    first, last = _generated(path)
    return Run(
        path=path,
        doing=reader.attempt(lambda: str(said(reader.folder).get("doing", "")), "") or ("finished" if summary else "unknown"),
        error=_error(reader),
        used=_used(config),
        versions=reader.mapping(VERSIONS),
        rows=rows,
        summary=summary,
        clients=_clients(rows, reader.mapping(PARTITION), kept),
        answers=_answers(_read_generated(reader, first), _read_generated(reader, last)),
        answered=(first, last),
        events=kept.events,
        digests=kept.digests,
        problems=reader.problems,
    )


def phases(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase of a row, without what is not a number."""
    found = row.get("seconds")
    named = list(found.items())[:MOST_PHASES] if isinstance(found, Mapping) else []
    pairs = {str(name)[:LONGEST_PHASE]: measured(value) for name, value in named}
    return {name: value for name, value in pairs.items() if value is not None}


def _used(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("used")
    return found if isinstance(found, Mapping) else {}


def _error(reader: _Reader) -> str:
    """Why the run ended, "" if nothing says so."""
    found = reader.mapping("error.json")
    kind, text = str(found.get("type", "")), str(found.get("message", ""))
    return f"{kind}: {text}" if kind and text else kind or text or str(reader.mapping("status.json").get("error") or "")


# ---------------------------------------------------------------------- the ledger


@dataclass
class _Kept:
    """What the ledger adds: weight and bytes of each client, events, digests."""

    shares: dict[str, float] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    events: list[tuple[int, str, Mapping[str, Any]]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


def _ledger(path: Path) -> _Kept:
    kept = _Kept()
    with Ledger.open(path) as ledger, ledger.at_one_moment():
        for row in ledger.rounds():
            for update in ledger.updates(row.number):
                kept.shares[update.client] = kept.shares.get(update.client, 0.0) + update.share
                kept.bytes_up[update.client] = kept.bytes_up.get(update.client, 0) + size_of(update.payload)
        kept.events = [(event.round, event.kind, event.detail) for event in ledger.events() if event.kind not in BOOKKEEPING]
        header = ledger.header
        kept.digests = {
            "base model": header.fingerprint.hex(),
            "order of parameters": header.layout.hex(),
            "partition": header.partition.hex(),
            "first pool of directions": header.pool.hex(),
        }
    return kept


def _clients(rows: Sequence[Mapping[str, Any]], partition: Mapping[str, Any], kept: _Kept) -> list[Client]:
    asked: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        asked.update(_names(row.get("clients")))
        refused = row.get("refused")
        for name, reason in refused.items() if isinstance(refused, Mapping) else ():
            reasons.setdefault(str(name), Counter())[str(reason)] += 1
    held = partition.get("clients")
    samples = {str(n): len(of) for n, of in enumerate(held) if isinstance(of, list)} if isinstance(held, list) else {}
    if asked and not asked.keys() & samples.keys():  # named nodes have data of their own, and no share of this division
        samples = {}
    whole = sum(kept.shares.values())
    return [
        Client(
            id=name,
            samples=samples.get(name),
            asked=asked[name],
            used=max(0, asked[name] - sum(reasons.get(name, Counter()).values())),
            reasons=reasons.get(name, {}),
            share=kept.shares.get(name, 0.0) / whole if whole else None,
            bytes_up=kept.bytes_up.get(name, 0) if whole else None,
        )
        for name in sorted({*samples, *asked, *reasons}, key=_in_order)
    ]


def _names(listed: object) -> list[str]:
    return [str(name) for name in listed] if isinstance(listed, list | tuple) else []


def _in_order(name: str) -> tuple[int, str]:
    """Numbers by size, before names."""
    return (int(name), "") if name.isascii() and name.isdigit() and len(name) < 12 else (10**12, name)


# ---------------------------------------------------------------------- generated responses


def _generated(path: Path) -> tuple[int | None, int | None]:
    """The first and the last round with generated responses; None where there is none, or no second one."""
    stems = [file.stem.removeprefix("generated_round_") for file in path.glob("generated_round_*.json")]
    numbers = sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) <= MOST_DIGITS)
    return (numbers[0] if numbers else None, numbers[-1] if len(numbers) > 1 else None)


def _read_generated(reader: _Reader, number: int | None) -> Mapping[str, Any]:
    return reader.mapping(f"generated_round_{number}.json") if number is not None else {}


def _answers(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[Answer]:
    before, after = _names(first.get("texts")), _names(last.get("texts"))
    keys = ("prompts", "references", "categories")
    prompts, expected, categories = (_names(last.get(key) or first.get(key)) for key in keys)
    return [
        Answer(_at(prompts, n) or "", _at(expected, n) or "", _at(before, n), _at(after, n), _at(categories, n) or "")
        for n in range(max(len(before), len(after)))
    ]


def _at(texts: Sequence[str], number: int) -> str | None:
    return texts[number] if number < len(texts) else None
