"""The model and the data of many runs, looked at once before any is started: what is missing would fail each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from fedtune.config import RunConfig
from fedtune.errors import FedtuneError
from fedtune.experiments.cells import Cell, reached

MODEL = ("model", "revision", "trust_remote_code")
DATA = (
    "data",
    "holdout_file",
    "instruction_column",
    "input_column",
    "output_column",
    "category_column",
    "partition",
    "holdout_category",
    "choices",
)
"""Settings by which the model's folder, and the rows, are found and checked."""


def check_sources(cells: Sequence[Cell]) -> None:
    """Look at what the runs that are not finished will load, each source once: is it there, and in a form that can be read?

    Weights are not loaded and no row is encoded. Runs that are finished need neither model nor data.

    Raises:
        FedtuneError: of the kind of the first problem (ModelError, DataError ...); it names all of them, each with its fix.
    """
    left = [cell.settings for cell in cells if not reached(cell.settings.out, cell.settings.rounds)]
    problems = [problem for look in _looks(left) if (problem := _problem(look))]
    if problems:
        said = " ".join(dict.fromkeys(map(str, problems)))
        facts = {name: value for problem in problems for name, value in problem.facts.items()}
        raise type(problems[0])(f"{said} No run was started.", **facts)


def _looks(left: Sequence[RunConfig]) -> Iterable[Callable[[], object]]:
    from fedtune.data.federated import needs_category  # with torch, which runs that are finished do not need
    from fedtune.data.samples import load_samples
    from fedtune.models import model_folder

    for config in _different(left, MODEL):
        yield partial(model_folder, config)
    for config in _different(left, DATA):
        yield partial(load_samples, config.data, config, needs_category(config))
        if config.holdout_file:
            yield partial(load_samples, config.holdout_file, config)


def _different(configs: Sequence[RunConfig], keys: Sequence[str]) -> Iterable[RunConfig]:
    """One of each with other values of `keys`."""
    return {tuple(getattr(config, key) for key in keys): config for config in configs}.values()


def _problem(look: Callable[[], object]) -> FedtuneError | None:
    try:
        look()
    except FedtuneError as error:
        return error
    return None
