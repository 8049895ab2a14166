"""Trackers: the numbers of a run, round by round, for TensorBoard, Weights & Biases or MLflow, whichever is asked for.

A tracker listens to the run's events (`fedtune.progress`) in the process that shows the run, and changes nothing in it. Where
each of them writes to is its own affair: TensorBoard to RUN/tensorboard; wandb and mlflow to wherever they are set up to
(environment variables WANDB_MODE=offline, WANDB_DIR, MLFLOW_TRACKING_URI), which may be a server in the network.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

from fedtune.config import RunConfig
from fedtune.errors import MissingPackageError
from fedtune.foreign import for_file, for_screen
from fedtune.progress import Event, Note, RoundFinished, emit, listening
from fedtune.report.run import phases
from fedtune.report.table import measured

PROJECT = "fedtune"
FOLDER = "tensorboard"
Log = Callable[[int, Mapping[str, float]], None]
MEASURES = {
    "eval_loss": "loss/held_out",
    "eval_loss_sample_mean": "loss/held_out_sample_mean",
    "train_loss": "loss/train",
    "perplexity": "quality/perplexity",
    "accuracy": "quality/accuracy",
    "rouge_l": "quality/rouge_l",
    "exact_match": "quality/exact_match",
    "bytes_up": "bytes/up",
    "bytes_down": "bytes/down",
}

MOST_CATEGORIES, LONGEST_CATEGORY = 200, 60  # of which the scores are logged; characters of a name

_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]")  # of a phase in a ledger: a slash would make a group, others are refused by mlflow


class Tracker(StrEnum):
    """What a run can be logged to."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


@contextmanager
def tracking(tracker: Tracker, config: RunConfig) -> Iterator[None]:
    """Log the rounds of the run of `config` inside the `with` block.

    Raises:
        MissingPackageError: the tracker's package is not installed; raised at once, before anything runs.
    """
    session = _Session(tracker, _imported(tracker), config)
    whole = False
    try:
        with listening(session.hear):
            yield
        whole = True
    finally:
        session.guarded(lambda: session.end(whole))


class _Session:
    """One tracked run: begun with its first round, when its folder is there, and left alone once the tracker fails."""

    def __init__(self, tracker: Tracker, package: Any, config: RunConfig) -> None:
        self.tracker, self.package, self.config = tracker, package, config
        self.end: Callable[[bool], None] = lambda _: None
        self._log: Log | None = None
        self._failed = False
        self._bytes = 0.0

    def hear(self, event: Event) -> None:
        if isinstance(event, RoundFinished):
            self.guarded(lambda: self._tell(event))

    def guarded(self, act: Callable[[], None]) -> None:
        """A tracker that cannot write stops no run."""
        if self._failed:
            return
        try:
            act()
        except Exception as error:
            self._failed = True
            why = for_file(f"{type(error).__name__}: {error}")
            emit(Note(f"{self.tracker} is no longer told about this run ({why}); the run goes on.", warning=True))

    def _tell(self, event: RoundFinished) -> None:
        if self._log is None:
            self._log, self.end = _BEGIN[self.tracker](self.package, self.config)
        values = numbers(event.metrics)
        self._bytes += values["bytes/up"] + values["bytes/down"]
        self._log(event.round, {**values, "bytes/so_far": self._bytes})


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What is logged of a row of metrics.jsonl: every finite number under a name of its own; bytes always."""
    pairs = {name: measured(metrics.get(key)) for key, name in MEASURES.items()}
    found = {"bytes/up": 0.0, "bytes/down": 0.0, **{name: value for name, value in pairs.items() if value is not None}}
    found |= _of_categories(metrics.get("categories"))
    each = {f"seconds/{_NO_NAME.sub('_', name)}": value for name, value in phases(metrics).items()}
    refused = metrics.get("refused")
    count = len(refused) if isinstance(refused, Mapping) else 0
    return {**found, **each, "seconds/round": sum(each.values()), "clients/refused": float(count)}


def _of_categories(categories: object) -> dict[str, float]:
    """Loss and accuracy of each category, under its name in plain characters, numbered where two have the same."""
    found: dict[str, float] = {}
    names: list[str] = []
    for name, scores in islice(categories.items(), MOST_CATEGORIES) if isinstance(categories, Mapping) else ():
        plain = _NO_NAME.sub("_", str(name)[:LONGEST_CATEGORY]) or "none"
        names.append(plain)
        plain += f".{names.count(plain)}" if names.count(plain) > 1 else ""
        for key, kind in (("eval_loss", "loss_of"), ("accuracy", "accuracy_of")):
            value = measured(scores.get(key)) if isinstance(scores, Mapping) else None
            if value is not None:
                found[f"{kind}/{plain}"] = value
    return found


# ---------------------------------------------------------------------- one function a tracker


def _tensorboard(package: Any, config: RunConfig) -> tuple[Log, Callable[[bool], None]]:
    """Event files in RUN/tensorboard; `tensorboard --logdir RUN` shows them."""
    writer = package.SummaryWriter(str(Path(config.out) / FOLDER))

    def log(number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, number)
        writer.flush()

    return log, lambda _: writer.close()


def _wandb(package: Any, config: RunConfig) -> tuple[Log, Callable[[bool], None]]:
    run = package.init(project=PROJECT, name=_title(config), config=config.as_mapping())

    def log(number: int, values: Mapping[str, float]) -> None:
        run.log(dict(values), step=number)

    return log, lambda whole: run.finish(exit_code=0 if whole else 1)


def _mlflow(package: Any, config: RunConfig) -> tuple[Log, Callable[[bool], None]]:
    package.set_experiment(PROJECT)
    package.start_run(run_name=_title(config))
    package.log_params(config.as_mapping())

    def log(number: int, values: Mapping[str, float]) -> None:
        package.log_metrics(dict(values), step=number)

    return log, lambda whole: package.end_run(status="FINISHED" if whole else "FAILED")


def _title(config: RunConfig) -> str:
    return for_screen(Path(config.out).name)


_BEGIN: dict[Tracker, Callable[[Any, RunConfig], tuple[Log, Callable[[bool], None]]]] = {
    Tracker.tensorboard: _tensorboard,
    Tracker.wandb: _wandb,
    Tracker.mlflow: _mlflow,
}


def _imported(tracker: Tracker) -> Any:
    module = "torch.utils.tensorboard" if tracker is Tracker.tensorboard else tracker.value
    try:
        return importlib.import_module(module)
    except ImportError:
        extra = "tensorboard" if tracker is Tracker.tensorboard else ""
        raise MissingPackageError.of(tracker.value, f"runs with --track {tracker}", extra) from None
