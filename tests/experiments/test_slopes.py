"""How many slopes are measured: less on a large model, as much as is asked for, and never more passes than are said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedtune.config import RunConfig
from fedtune.experiments import slopes
from fedtune.experiments.slopes import POINTS, Points, advise, measure
from fedtune.progress import EvaluationStep, Event, listening
from fedtune.resident import Resident

Settings = Callable[..., RunConfig]


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path) -> Settings:
    def build(**changes: object) -> RunConfig:
        usual = {
            "algorithm": "fedkseed", "model": str(tiny_folder), "data": str(instructions), "clients": 2, "K": 64, "lr": 1e-3,
            "max_length": 64, "template": "plain", "min_samples": 2, "threads": 1, "device": "cpu",
        }  # fmt: skip
        return RunConfig.from_mapping({**usual, **changes})

    return build


def one_pass(here: Resident, batch_size: int = 1) -> float:
    """Weights x tokens of a forward pass over a batch, the direction counted as 400."""
    tokens = [len(sample.input_ids) for samples in here.data.clients for sample in samples]
    return sum(weight.numel() for weight in here.replica.weights) * (batch_size * sum(tokens) / len(tokens) + 400)


@pytest.mark.parametrize("places", range(len(POINTS)))
def test_the_largest_number_of_points_within_the_budget_is_taken(
    settings: Settings, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By weights, tokens and rows of a batch; where none is within, the last. What is asked for stands."""
    config = settings(batch_size=3)
    here = Resident(config)
    here.load()
    work = one_pass(here, batch_size=3)
    monkeypatch.setattr(slopes, "MOST_WORK", 1.001 * work * POINTS[places].passes)
    assert slopes._points(here, config, 0, 0) == POINTS[places]
    monkeypatch.setattr(slopes, "MOST_WORK", 0.999 * work * POINTS[places].passes)
    assert slopes._points(here, config, 0, 0) == POINTS[min(places + 1, len(POINTS) - 1)]
    assert slopes._points(here, config, 64, 0) == Points(64, POINTS[min(places + 1, len(POINTS) - 1)].batches)
    assert slopes._points(here, config, 64, 16) == Points(64, 16)


def test_what_is_told_is_what_is_measured(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slopes, "MOST_WORK", 0.0)
    told: list[tuple[Points, int]] = []
    seen: list[Event] = []
    with listening(seen.append):
        advice = advise(settings(), told=lambda points, weights: told.append((points, weights)))
    points = POINTS[-1]
    assert told == [(points, advice.weights)]
    assert (advice.rate.directions, advice.rate.batches) == (points.directions, points.batches)
    assert [event.total for event in seen if isinstance(event, EvaluationStep)][-1] == points.directions * points.batches
    assert len({event.done for event in seen if isinstance(event, EvaluationStep)}) == points.directions * points.batches


@pytest.mark.parametrize("points", [POINTS[0], POINTS[-1]])
def test_the_passes_are_counted_with_those_that_choose_the_distance(points: Points) -> None:
    passes = [0]

    def flat(d: int, b: int, offsets: Sequence[float]) -> list[float]:
        passes[0] += len(offsets)
        return [1.0 for _ in offsets]

    measure(flat, directions=points.directions, batches=points.batches, eps=1e-3, rounding=1e-7)
    assert passes[0] == points.passes  # a flat loss widens the distance as often as may be


def test_every_size_costs_less_than_the_one_before() -> None:
    passes = [points.passes for points in POINTS]
    assert passes == sorted(set(passes), reverse=True)
