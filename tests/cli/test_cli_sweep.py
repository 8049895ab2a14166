"""`fedtune sweep` as it is typed: what is refused, what is printed, and the measured learning rate of a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playback import Outcome, last_json

from fedtune.cli import sweep as sweep_module
from fedtune.cli import watch
from fedtune.experiments import slopes
from fedtune.experiments.sweep import Plan, Result


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """No runs: the losses of the combinations fall in their order; the list collects the plans."""
    seen: list[Plan] = []

    def run_sweep(plan: Plan, **options: object) -> list[Result]:
        seen.append(plan)
        count = len(plan.combinations)
        losses = [tuple(4.0 - 0.1 * i + 0.01 * seed for seed in plan.seeds) for i in range(count)]
        results = [Result(one, plan.rungs[-1], loss, 4.5, "") for one, loss in zip(plan.combinations, losses, strict=True)]
        plan.out.mkdir(parents=True)
        return results[::-1]

    monkeypatch.setattr(sweep_module, "run_sweep", run_sweep)
    monkeypatch.setattr(sweep_module, "_measured", lambda *rest: {})
    return seen


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 1, "Nothing is swept: give --over KEY=VALUE,VALUE"),
        (("--over", "lr"), 2, "--over takes KEY=VALUE,VALUE,..., not 'lr'"),
        (("--over", "lr="), 2, "not 'lr='"),
        (("--over", "lr=1e-5,,1e-4"), 2, "not 'lr=1e-5,,1e-4'"),
        (("--over", "learning_rate=1e-5"), 1, "There is no setting 'learning_rate'. Did you mean 'lr'?"),
        (("--over", "lr=1e-5,fast"), 1, "Setting 'lr' = 'fast'"),
        (("--over", "lr=1e-5,1e-4", "--set", "lr=1"), 2, "both in --set and in --over"),
        (("--over", "rounds=2,4"), 1, "early stop divides"),
        (("--over", "lr=1e-5,1e-4", "--keep", "0"), 1, "--keep above 0"),
        (("--over", "lr=1e-5", "--measure"), 2, "--measure runs nothing"),
        (("--measure", "--repeats", "1"), 2, "one round says nothing of its noise"),
        (("--measure", "--directions", "1"), 2, "one direction says nothing of its noise"),
        (("--measure", "--batches", "1"), 2, "one batch says nothing of its noise"),
    ],
)
def test_what_is_typed_wrongly_is_said(
    fedtune: Callable[..., Outcome], preset: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    outcome = fedtune("sweep", "small.toml", *arguments)
    assert outcome.code == code
    assert says in outcome.err
    assert not list(Path().glob("runs*"))


def test_the_end_says_what_to_use_and_what_the_losses_are_not_good_for(
    fedtune: Callable[..., Outcome], invented: list[Plan], preset: Path
) -> None:
    line = ("sweep", "small.toml", "--over", "lr=1e-5,1e-4", "--over", "K=64,128", "--set", "rounds=8", "--out", "s")
    outcome = fedtune(*line, "--seeds", "2")
    assert outcome.code == 0, outcome.err
    assert "4 combinations x 2 seeds, compared after 2, 4, 8 of 8 rounds, in s" in outcome.out
    assert re.search(r"(?m)^ *0\.0001 +128 +8 +3\.7050 +0\.0071 +-0\.7950", outcome.out)
    assert "fedtune simulate small.toml --set rounds=8 --set lr=0.0001 --set K=128" in outcome.out
    assert "lr=0.0001 is the largest value tried" in outcome.out
    assert "report it on held-out samples that had no part in the choice" in outcome.out
    assert invented[0].seeds == (0, 1)
    rows = Path("s/sweep.csv").read_text().splitlines()
    assert rows[0] == "lr,K,rounds,seeds,loss,spread,base_loss,stopped,folder"
    assert len(rows) == 5


def test_json_is_the_last_line(fedtune: Callable[..., Outcome], invented: list[Plan], preset: Path) -> None:
    outcome = fedtune("sweep", "small.toml", "--over", "lr=1e-5,1e-4", "--out", "s", "--json")
    assert outcome.out.count("\n") == 1
    assert [row["lr"] for row in json.loads(outcome.out)] == [1e-4, 1e-5]


def test_a_schedule_over_the_rounds_runs_without_early_stop(
    fedtune: Callable[..., Outcome], invented: list[Plan], preset: Path
) -> None:
    settings = ("--set", "algorithm=ferret", "--set", "anneal=cosine", "--set", "rounds=8")
    outcome = fedtune("sweep", "small.toml", "--over", "lr=1e-5,1e-4", *settings, "--out", "s")
    assert "No early stop: anneal = cosine" in outcome.out
    assert invented[0].rungs == (8,)


@pytest.mark.parametrize("algorithm", ["ferret", "fedavg"])
def test_a_tiny_model_has_a_range_test(
    fedtune: Callable[..., Outcome],
    tiny_folder: Path,
    instructions: Path,
    preset: Path,
    algorithm: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "SIGN_OF_LIFE", 0.0)
    small = f"algorithm={algorithm} clients=2 min_samples=2 max_length=64 template=plain threads=1 device=cpu local_steps=2"
    words = (*small.split(), f"model={tiny_folder}", f"data={instructions}", "lr=1e-2")
    settings = [word for text in words for word in ("--set", text)]
    outcome = fedtune("sweep", "small.toml", "--measure", "--repeats", "2", "--json", *settings)
    assert outcome.code == 0, outcome.err
    found = last_json(outcome.out)
    tried = {one["lr"]: one["change"] for one in found["tried"]}
    assert len(tried) >= 3
    for rate, change in tried.items():
        said = "diverged in round" if change is None else f"loss {change:+.4f} in a round (standard error"
        assert f"lr {rate:g}: {said}" in outcome.err
    assert re.search(r"range test: at each rate 2 rounds from the base model, each of (1 client|2 clients) x 2 st", outcome.err)
    assert ("recommended lr: " in outcome.err) == (found["recommended"] is not None)
    assert "the held-out set, which was not read" in outcome.err
    assert ", local step 2 of 2" in outcome.err, "a long measurement gives signs of life"
    assert not list(Path().glob("runs*"))


def test_a_tiny_model_is_measured(fedtune: Callable[..., Outcome], tiny_folder: Path, instructions: Path, preset: Path) -> None:
    small = "clients=2 min_samples=2 max_length=64 template=plain threads=1 device=cpu eps=1e-3"
    settings = [word for text in (*small.split(), f"model={tiny_folder}", f"data={instructions}") for word in ("--set", text)]
    outcome = fedtune("sweep", "small.toml", "--measure", "--directions", "8", "--batches", "4", "--json", *settings)
    assert outcome.code == 0, outcome.err
    found = last_json(outcome.out)
    assert found["clients"] == 2
    assert re.search(r"(?m)^measuring slopes along 8 directions on 4 batches each$", outcome.err)
    assert "slopes: 8 directions x 4 batches at eps 0.001" in outcome.err
    assert ("recommended lr: " in outcome.err) == found["seen"]
    assert ("no recommendation: " in outcome.err) == (not found["seen"])
    again = fedtune("sweep", "small.toml", "--measure", "--directions", "8", "--batches", "4", "--json", *settings)
    assert last_json(again.out) == found


def test_fewer_slopes_on_a_large_model_are_said_with_the_reason(
    fedtune: Callable[..., Outcome], tiny_folder: Path, instructions: Path, preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here every model is large. What is asked for is measured, and needs no reason."""
    monkeypatch.setattr(slopes, "MOST_WORK", 0.0)
    small = "clients=2 min_samples=2 max_length=64 template=plain threads=1 device=cpu eps=1e-3"
    settings = [word for text in (*small.split(), f"model={tiny_folder}", f"data={instructions}") for word in ("--set", text)]
    outcome = fedtune("sweep", "small.toml", "--measure", *settings)
    assert outcome.code == 0, outcome.err
    least, most = slopes.POINTS[-1], slopes.POINTS[0]
    assert (
        f"measuring slopes along {least.directions} directions on {least.batches} batches each: {least.passes} forward passes "
        "at most, fewer than on a small model, since each takes long with "
    ) in outcome.out.replace("\n", " ")
    assert f"For smaller errors: --directions {most.directions} --batches {most.batches}" in outcome.out.replace("\n", " ")
    assert f"slopes: {least.directions} directions x {least.batches} batches" in outcome.out
    asked = fedtune("sweep", "small.toml", "--measure", "--directions", "3", "--batches", "2", *settings)
    assert re.search(r"(?m)^measuring slopes along 3 directions on 2 batches each$", asked.out)
    assert "slopes: 3 directions x 2 batches" in asked.out
