"""The federation's data in one object: each client's tokens, the held-out set, and a report of what was kept and dropped."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.config import RunConfig
from fedtune.data.choices import Questions, questions_of
from fedtune.data.encode import Encoded, encode
from fedtune.data.partition import Partition, partition, split_heldout
from fedtune.data.samples import Sample, load_samples
from fedtune.errors import EmptyClientError
from fedtune.seeds import Stream


@dataclass(frozen=True)
class Lengths:
    """Tokens per sample."""

    shortest: int
    median: float
    longest: int


@dataclass(frozen=True)
class DataReport:
    """What became of the rows; all that `fedtune data show` prints. Counts are of samples unless named otherwise."""

    source: str
    rows: int
    dropped: dict[str, int]
    """Reason -> training-file rows left out."""
    heldout_dropped: dict[str, int]
    """The same for a held-out file of its own."""
    truncated: int
    """Responses that lost their end to max_length (both files)."""
    clients: tuple[dict[str, int], ...]
    """Per client: category ("" for none) -> samples."""
    heldout: dict[str, int]
    lengths: Lengths
    """Prompt and response together, over all clients."""
    response_lengths: Lengths
    example: tuple[tuple[str, bool], ...]
    """The first client's first sample, as `describe` gives it."""
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class FederatedData:
    """Tokens of each client and of the held-out set (with its texts, and its questions, in the same order)."""

    clients: tuple[tuple[Encoded, ...], ...]
    heldout: tuple[Encoded, ...]
    heldout_samples: tuple[Sample, ...]
    questions: Questions
    partition: Partition
    report: DataReport


def load_federated(config: RunConfig, tokenizer: Any) -> FederatedData:
    """Read `config.data`, drop and count what cannot be used, hold out, and divide the rest over the clients.

    Only usable rows are divided, so `min_samples` counts samples that can be trained on. With `eval_samples` the held-out
    set is a random subset of that size, drawn from the stream (seed, "partition", "eval_samples").

    Raises:
        DataError: a file, column, category, template or source of answers (`choices`) that cannot be used.
        EmptyClientError: a client, the held-out set or the training set without a usable sample.
    """
    file = _read(config.data, config, tokenizer, needs_category(config))
    categories = {row: file.samples[row].category for row in file.usable}
    if config.holdout_file:
        training, held_file = list(file.usable), _read(config.holdout_file, config, tokenizer, False)
        heldout_rows = list(held_file.usable)
    else:
        training, heldout_rows = split_heldout(categories, config)
        held_file = file
    heldout_rows = _limit(heldout_rows, config)
    client_rows = partition({row: categories[row] for row in training}, config)
    clients = tuple(tuple(file.usable[row] for row in rows) for rows in client_rows)
    heldout_samples = tuple(held_file.samples[row] for row in heldout_rows)
    questions = questions_of(heldout_samples, held_file.samples, held_file.source, tokenizer, config)
    return FederatedData(
        clients=clients,
        heldout=tuple(held_file.usable[row] for row in heldout_rows),
        heldout_samples=heldout_samples,
        questions=questions,
        partition=Partition(client_rows, tuple(heldout_rows), config.holdout_file),
        report=_report(file, held_file, clients, heldout_rows, tokenizer, questions),
    )


def needs_category(config: RunConfig) -> bool:
    """Whether every row of `config.data` must say its category: clients or the held-out set are made by it."""
    return config.partition in ("dirichlet", "column") or bool(config.holdout_category)


def load_local(config: RunConfig, tokenizer: Any, path: str) -> tuple[Encoded, ...]:
    """The usable samples of one node's own data file, in row order, for deployments where data never leaves its node.

    Raises:
        DataError: the file cannot be used.
        EmptyClientError: fewer than `config.min_samples` of its rows can be used.
    """
    file = _read(path, config, tokenizer, False)
    if len(file.usable) < config.min_samples:
        raise EmptyClientError(
            f"'{path}' has {len(file.usable)} usable samples of {len(file.samples)}{_spelled(file.dropped)}, fewer than "
            f"min_samples = {config.min_samples}: give this node more data, raise max_length or lower min_samples.",
            samples=len(file.usable),
        )
    return tuple(file.usable.values())


def describe(encoded: Encoded, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """The sample as the model sees it: (text, trained on) pieces in order, special tokens spelled out."""
    prompt, response = encoded.input_ids[: encoded.prompt_length], encoded.input_ids[encoded.prompt_length :]
    return ((str(tokenizer.decode(prompt)), False), (str(tokenizer.decode(response)), True))


@dataclass(frozen=True)
class _File:
    """A data file in tokens: all samples, the usable rows (ascending), reason -> rows dropped."""

    source: str
    samples: tuple[Sample, ...]
    usable: dict[int, Encoded]
    dropped: dict[str, int]
    truncated: int
    notes: tuple[str, ...]


def _read(source: str, config: RunConfig, tokenizer: Any, by_category: bool) -> _File:
    samples, notes = load_samples(source, config, by_category)
    encoded = encode(samples, tokenizer, config.template, config.max_length)
    dropped = dict(sorted(Counter(encoded.dropped.values()).items()))
    if not encoded.usable:
        raise EmptyClientError(
            f"None of the {len(samples)} rows of '{source}' can be used{_spelled(dropped)}: "
            "raise max_length or check the columns.",
            dropped=dropped,
        )
    return _File(source, samples, {one.row: one for one in encoded.usable}, dropped, encoded.truncated, notes)


def _limit(heldout_rows: list[int], config: RunConfig) -> list[int]:
    if not 0 < config.eval_samples < len(heldout_rows):
        return heldout_rows
    chosen = Stream(config.seed, "partition", "eval_samples").subset(len(heldout_rows), config.eval_samples)
    return [heldout_rows[index] for index in chosen]


def _report(
    file: _File,
    held_file: _File,
    clients: Sequence[Sequence[Encoded]],
    heldout_rows: Sequence[int],
    tokenizer: Any,
    questions: Questions,
) -> DataReport:
    own_file = held_file is not file
    trained = [sample for own in clients for sample in own]
    return DataReport(
        source=file.source,
        rows=len(file.samples),
        dropped=file.dropped,
        heldout_dropped=held_file.dropped if own_file else {},
        truncated=file.truncated + (held_file.truncated if own_file else 0),
        clients=tuple(_histogram(file.samples[sample.row] for sample in own) for own in clients),
        heldout=_histogram(held_file.samples[row] for row in heldout_rows),
        lengths=_lengths([len(sample.input_ids) for sample in trained]),
        response_lengths=_lengths([sample.response_length for sample in trained]),
        example=describe(trained[0], tokenizer),
        notes=(*file.notes, *(held_file.notes if own_file else ()), *filter(None, [questions.note])),
    )


def _histogram(samples: Iterable[Sample]) -> dict[str, int]:
    return dict(sorted(Counter(sample.category for sample in samples).items()))


def _lengths(lengths: Sequence[int]) -> Lengths:
    return Lengths(min(lengths), statistics.median(lengths), max(lengths))


def _spelled(dropped: Mapping[str, int]) -> str:
    """' (12 prompt fills max_length, 3 empty response)', or nothing."""
    return f" ({', '.join(f'{count} {reason}' for reason, count in dropped.items())})" if dropped else ""
