"""Rounds of the range test on a tiny model: the method's own, the same for the same seed, and blind to the held-out set."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedtune.config import RunConfig
from fedtune.errors import SweepError
from fedtune.evaluation import response_loss
from fedtune.experiments import first_rounds
from fedtune.experiments.first_rounds import ASIDE, Rounds, Size, advise, for_all_steps
from fedtune.experiments.rate_range import search
from fedtune.resident import Resident

Settings = Callable[..., RunConfig]
SMALL = Size(rounds=2, clients=2, steps=2, samples=6)
METHODS: dict[str, dict[str, object]] = {
    "ferret": {"K": 200, "lr": 1e-2, "pool_every": 1},
    "ferret, shared": {"K": 200, "lr": 1e-2, "coordinates": "shared"},
    "fedavg": {"lr": 1e-2},
    "lora": {"lr": 1e-1, "lora_rank": 2},
    "local": {"lr": 1e-2, "only_client": "2"},
    "central": {"lr": 1e-2},
}


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path) -> Settings:
    def build(name: str = "fedavg", **changes: object) -> RunConfig:
        usual = {
            "algorithm": name.partition(",")[0], "model": str(tiny_folder), "data": str(instructions), "clients": 4,
            "clients_per_round": 2, "local_steps": 2, "max_length": 64, "template": "plain", "min_samples": 2, "threads": 1,
            "device": "cpu", "holdout_category": "colours",
        }  # fmt: skip
        return RunConfig.from_mapping({**usual, **METHODS[name], **changes})

    return build


def rounds(config: RunConfig, size: Size = SMALL) -> Rounds:
    here = Resident(config)
    here.load()
    return Rounds(here, config, size)


@pytest.mark.parametrize("name", METHODS)
def test_a_round_moves_the_loss_the_same_way_every_time(settings: Settings, name: str) -> None:
    runs = rounds(settings(name))
    rate = float(runs.config.lr)
    first, huge, again = runs.change(rate, 1), runs.change(1e6, 1), runs.change(rate, 1)
    assert math.isfinite(first)
    assert first != 0.0
    assert huge == math.inf
    assert again == first, "what ran before leaves nothing"
    assert rounds(settings(name)).change(rate, 1) == first
    assert runs.change(rate, 2) != first, "every round has clients, batches and samples of its own"
    assert rounds(settings(name, seed=1)).change(rate, 1) != first


@pytest.mark.parametrize("name", METHODS)
def test_the_held_out_set_is_not_read(settings: Settings, tmp_path: Path, instructions: Path, name: str) -> None:
    """With other held-out rows, of the same number and place, nothing that is measured changes."""
    rows = [json.loads(line) for line in instructions.read_text().splitlines()]
    held = sorted({row["category"] for row in rows})[0]
    other = tmp_path / "other.jsonl"
    changed = [{**row, "output": f"nothing like it {n}"} if row["category"] == held else row for n, row in enumerate(rows)]
    other.write_text("".join(json.dumps(row) + "\n" for row in changed))
    found = [rounds(settings(name, data=str(path), holdout_category=held)).tried(1e-2) for path in (instructions, other)]
    assert found[0] == found[1]


def test_what_is_trained_on_is_not_measured_on(settings: Settings) -> None:
    runs = rounds(settings())
    trained = [sample.input_ids for samples in runs._trained for sample in samples]
    aside = [sample.input_ids for sample in runs._aside]
    everything = [sample.input_ids for samples in runs.here.data.clients for sample in samples]
    assert sorted(trained + aside) == sorted(everything)
    assert not set(map(tuple, trained)) & set(map(tuple, aside))
    assert len(aside) == sum(len(samples) // ASIDE for samples in runs.here.data.clients)


def test_a_round_of_fedavg_is_the_mean_of_plain_descents(settings: Settings) -> None:
    """Against a loop without any of our machinery: w - lr g from the same batches, client by client, then the mean."""
    config = settings(lr=5e-2)
    runs = rounds(config)
    here = runs.here
    runs._train(runs.config.replace(lr=5e-2), 1)
    after = [weight.detach().clone() for weight in here.replica.weights]
    here.replica.become(runs._base)
    start = [weight.detach().clone() for weight in here.replica.weights]
    clients = runs._clients(1)
    counts = [len(runs._trained[client]) for client in clients]
    mean = [torch.zeros_like(weight) for weight in start]
    for client, count in zip(clients, counts, strict=True):
        for weight, first in zip(here.replica.weights, start, strict=True):
            weight.data.copy_(first)
        batches = here.batches(config, str(client), runs._trained[client], 1)
        for _ in range(2):
            loss = response_loss(here.replica.model, next(batches))
            gradients = torch.autograd.grad(loss, here.replica.weights)
            for weight, gradient in zip(here.replica.weights, gradients, strict=True):
                weight.data.sub_(gradient, alpha=5e-2)
        for part, weight, first in zip(mean, here.replica.weights, start, strict=True):
            part.add_(weight.detach() - first, alpha=count / sum(counts))
    for found, first, part in zip(after, start, mean, strict=True):
        torch.testing.assert_close(found, first + part, rtol=1e-5, atol=1e-7)


def test_ferrets_rebuild_bears_a_smaller_rate_than_the_steps_themselves(settings: Settings) -> None:
    """K = 20 coordinates of 20,000: the rebuild's error is thirty times the update, so it is measured through the rebuild."""
    size = Size(rounds=2, clients=1, steps=3, samples=4)
    own = {"local_steps": 3, "lr": 1e-2}
    plain = advise_with(settings("fedavg", **own), size)
    rebuilt = advise_with(settings("ferret", **own, K=20), size)
    assert rebuilt <= plain / 9


def advise_with(config: RunConfig, size: Size) -> float:
    return search(rounds(config, size).tried, config.lr).best.rate


def test_the_advice_is_the_same_for_the_same_seed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_rounds, "SIZES", (Size(9, 9, 9, 4),))
    told: list[float] = []
    first = advise(settings(), 2, told=lambda one: told.append(one.rate))
    assert advise(settings(), 2) == first
    assert sorted(told) == [one.rate for one in first.found.tried]
    assert first.size == Size(2, 2, 2, 4)
    assert first.recommended in told


def test_a_large_model_is_measured_with_less(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first size within the budget; where none is, the last; never more than a round of the settings."""
    config = settings(local_steps=12)
    here = Resident(config)
    here.load()
    whole = first_rounds._whole(config)
    assert (whole.clients, whole.steps) == (2, 12)
    tokens = [len(sample.input_ids) for samples in here.data.clients for sample in samples]
    step = sum(weight.numel() for weight in here.replica.weights) * sum(tokens) / len(tokens)
    for steps, expected in ((96.1, Size(4, 2, 12, 32)), (95.9, Size(4, 1, 12, 16)), (0.0, Size(4, 1, 5, 8))):
        monkeypatch.setattr(first_rounds, "MOST_WORK", steps * step)
        assert first_rounds._size(here, config, whole) == expected


def test_fewer_steps_than_a_round_has_lower_ferrets_rate_alone(settings: Settings) -> None:
    assert for_all_steps(settings("ferret", local_steps=50), 10) == 0.2
    assert for_all_steps(settings("fedavg", local_steps=50), 10) == 1.0


def test_what_has_no_gradients_or_too_few_samples_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="fedkseed measures slopes"):
        advise(settings(algorithm="fedkseed"))
    few = tmp_path / "few.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": f"{n}", "category": "colours" if n > 11 else "b"} for n in range(16)]
    few.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SweepError, match="No client has 4 samples"):
        advise(settings(data=str(few)))
