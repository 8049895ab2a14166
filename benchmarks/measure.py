"""What a benchmark returns and how time is taken: rows of three figures, medians of alternated runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Case = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Options:
    """What every benchmark is told.

    Attributes:
        elements: float32 parameters that directions are added to, combined over and projected from.
        pool: K.
        repeats: times that each case runs after one run that does not count.
        threads: of torch, and so of the directions.
        device: of weights and models.
        steps: local steps of the dtype benchmark.
        sizes: names of the models (`models.SIZES`); none: those that a benchmark has by default.
        only: part of the names of the rows of first-order and whole that are measured; "": all.
        cpu_time: on the CPU, time is that of all threads and not of the clock on the wall.
        quick: sizes of a smoke test; its figures mean nothing.
    """

    elements: int = 1 << 26
    pool: int = 4096
    repeats: int = 5
    threads: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    steps: int = 300
    sizes: Sequence[str] = ()
    only: str = ""
    cpu_time: bool = False
    quick: bool = False

    @property
    def clock(self) -> Clock:
        """What tells the time on the CPU, in seconds."""
        return time.process_time if self.cpu_time else time.perf_counter

    @property
    def slow_repeats(self) -> int:
        """Repeats of a case that takes many seconds."""
        return min(self.repeats, 3)


@dataclass(frozen=True)
class Row:
    """One line of the table. A figure is None where there is nothing to compare with.

    Attributes:
        name: benchmark and case, such as combine.hadamard.
        ours, baseline, limit: in `unit`; smaller is better. `baseline` is the official code's way, `limit` what the
            machine (or the problem) allows.
        at_most_of_limit, at_least_below_baseline: the targets for the two ratios.
        conditions: sizes, and what was scaled from fewer repetitions.
    """

    name: str
    unit: str
    ours: float | None
    baseline: float | None
    limit: float | None
    conditions: str
    at_most_of_limit: float | None = None
    at_least_below_baseline: float | None = None

    @property
    def ratio_to_baseline(self) -> float | None:
        """baseline / ours: how many times better than the official way."""
        return self.baseline / self.ours if self.ours and self.baseline is not None else None

    @property
    def ratio_to_limit(self) -> float | None:
        """ours / limit: how far from what is possible."""
        return self.ours / self.limit if self.ours is not None and self.limit else None

    @property
    def met(self) -> bool | None:
        """Whether all targets that the row has are met; None if it has none, or no figures."""
        checks = []
        if self.at_most_of_limit is not None and self.ratio_to_limit is not None:
            checks.append(self.ratio_to_limit <= self.at_most_of_limit)
        if self.at_least_below_baseline is not None and self.ratio_to_baseline is not None:
            checks.append(self.ratio_to_baseline >= self.at_least_below_baseline)
        return all(checks) if checks else None

    def as_mapping(self) -> dict[str, Any]:
        """The row as it stands in the JSON file."""
        return {
            "name": self.name,
            "ours": self.ours,
            "baseline": self.baseline,
            "limit": self.limit,
            "ratio_to_baseline": self.ratio_to_baseline,
            "ratio_to_limit": self.ratio_to_limit,
            "unit": self.unit,
            "target_to_baseline": self.at_least_below_baseline,
            "target_to_limit": self.at_most_of_limit,
            "met": self.met,
            "conditions": self.conditions,
        }


def alternate(
    cases: Mapping[str, Case], repeats: int, device: torch.device, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each case: all run once unmeasured, then `repeats` times in turn, so that a slow minute of the
    machine falls on all of them."""
    for case in cases.values():
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            seconds[name].append(_timed(case, device, clock))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(case: Case, device: torch.device, clock: Clock) -> float:
    """Seconds of one run; on a GPU between two events of its stream, so that all queued work is in."""
    if device.type != "cuda":
        start = clock()
        case()
        return clock() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    before.record()
    case()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1e3
