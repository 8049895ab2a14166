"""The benchmarks run at tiny sizes, and their rows say what they should. No figure of time is ever asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import first_order, limits, official, whole
from benchmarks.__main__ import line, main, run
from benchmarks.measure import Options, Row, alternate
from benchmarks.models import QUICK, SIZES, STEPS, models, save_random
from fedtune.algorithms.first_order import FirstOrder
from fedtune.config import RunConfig
from fedtune.directions import Directions, Pool
from fedtune.layout import Layout

FIELDS = {
    "name",
    "ours",
    "baseline",
    "limit",
    "ratio_to_baseline",
    "ratio_to_limit",
    "unit",
    "target_to_baseline",
    "target_to_limit",
    "met",
    "conditions",
}
OPTIONS = Options(elements=1 << 17, pool=8, repeats=1, threads=1, quick=True)


def test_rows_are_complete_and_their_ratios_follow_from_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_SHARED", str(tmp_path))
    monkeypatch.setattr(first_order, "KINDS", first_order.KINDS[-1:])
    file = tmp_path / "rows.json"
    main(["project", "--quick", "--threads", "1", "--device", "cpu", "--json", str(file)])
    written = json.loads(file.read_text(encoding="utf-8"))
    assert all(set(row) == FIELDS for row in written)
    rows = [*written, *(row.as_mapping() for row in run(["add", "combine", "step", "first-order", "dtype"], OPTIONS))]
    names = [row["name"] for row in rows]
    assert {"limits.scale", "add.hadamard", "combine.hadamard", "project.gaussian", "step.hadamard"} <= set(names)
    assert {f"step.first-order.{method}-bfloat16-master-quick" for method in first_order.METHODS} <= set(names)
    assert {"round.ferret-both-bfloat16-master-quick", "step.lowrank-8"} <= set(names)
    for row in rows:
        if row["ours"] is None:
            assert row["name"].startswith("limits.") or row["conditions"].startswith("skipped: no shared model")
            continue
        assert min(row["ours"], row["limit"]) > 0
        if row["name"].startswith(("step.first-order.", "step.subspace-", "round.")):
            assert row["baseline"] is None, "what they are held to is a plain loop, and memory"
        else:
            assert row["baseline"] > 0
            assert math.isclose(row["ratio_to_baseline"], row["baseline"] / row["ours"])
        assert math.isclose(row["ratio_to_limit"], row["ours"] / row["limit"])
        assert row["met"] is None, "quick runs are not held to targets"
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in names)


def test_a_target_is_met_when_both_ratios_are() -> None:
    row = Row("a.b", "ms", 2.0, 100.0, 1.0, "", at_most_of_limit=2.0, at_least_below_baseline=50.0)
    assert row.met is True
    assert Row("a.b", "ms", 2.0, 99.0, 1.0, "", 2.0, 50.0).met is False
    assert Row("a.b", "ms", 2.1, 200.0, 1.0, "", 2.0, 50.0).met is False
    assert Row("a.b", "ms", None, None, 1.0, "skipped", 2.0).met is None
    assert line(row) == "| a.b | 2 | 100 | 1 | ms | 50 | 2 | ≥ 50 x below official, ≤ 2 x limit | yes |  |"


def test_cases_take_turns() -> None:
    order: list[str] = []
    alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, torch.device("cpu"))
    assert order == ["a", "b"] * 3


def test_time_is_told_by_the_clock_that_was_asked_for() -> None:
    ticks = iter(range(0, 100, 7))
    assert alternate({"a": lambda: None}, 3, torch.device("cpu"), lambda: float(next(ticks))) == {"a": 7.0}
    assert Options(cpu_time=True).clock is time.process_time
    assert Options().clock is time.perf_counter


def test_steps_are_measured_on_the_models_that_were_asked_for() -> None:
    assert set(models(Options())) == set(STEPS)
    assert models(Options(), tuple(SIZES)) == SIZES
    assert models(Options(sizes=("135M",))) == {"135M": SIZES["135M"]}
    assert models(OPTIONS) == {"quick": QUICK}


@pytest.mark.parametrize(
    ("optimizer", "dtype", "lr"),
    [("sgd", "float32", 1e-2), ("adamw", "float32", 1e-4), ("sgd", "bfloat16", 1.0), ("adamw", "bfloat16", 1e-3)],
)
def test_the_plain_loop_takes_the_steps_that_ours_are_held_to(tmp_path: Path, optimizer: str, dtype: str, lr: float) -> None:
    """The same change of the weights in two steps but for rounding, with a master copy where they have 16 bits."""
    save_random(QUICK, tmp_path)
    rounding = {"update_rounding": "master"} if dtype == "bfloat16" else {}
    config = RunConfig(
        model=str(tmp_path), algorithm="ferret", optimizer=optimizer, dtype=dtype, lr=lr, max_length=32, threads=1, **rounding
    )
    one, other = (first_order.work_of(config, QUICK) for _ in range(2))
    with FirstOrder(one, config) as steps:
        steps.take()
        steps.take()
    first_order.plain_loop(other, config)(2)
    start, ours, theirs = (
        torch.cat([weight.detach().float().flatten() for weight in work.weights])
        for work in (first_order.work_of(config, QUICK), one, other)
    )
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()
    assert all(weight.grad is None for weight in other.weights)


def test_tensors_have_as_many_elements_as_asked() -> None:
    assert sum(tensor.numel() for tensor in limits.weights(1 << 17, torch.device("cpu"))) == 1 << 17


def test_the_official_axpy_is_the_one_of_family_torch() -> None:
    weights = [torch.ones(3, 20), torch.ones(7)]
    layout = Layout.from_shapes([(str(i), tuple(w.shape)) for i, w in enumerate(weights)])
    expected = [weight.clone() for weight in weights]
    Directions(layout, Pool("torch", 0, 1, candidates=(5,))).add(expected, 0, -2e-3)
    with torch.random.fork_rng():
        official.update(weights, 5, 2.0, 1e-3)
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-7)


def test_the_official_rebuild_adds_what_the_official_projection_is_along() -> None:
    start = torch.zeros(40, 50)
    with torch.random.fork_rng():
        weights = [start.clone()]
        official.rebuild(weights, [3], torch.tensor([[2.0]]), 0.5)
        z = official.base(3, start, 2000)
        torch.testing.assert_close(weights[0].flatten(), -z)
        torch.testing.assert_close(official.project([z], [3])[0, 0], z.square().sum())


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    parameters = save_random(QUICK, tmp_path)
    command = [sys.executable, "-m", "benchmarks.memory_case", "inference", str(tmp_path), "32", "cpu", "1", "64", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert 1 < float(done.stdout) / (4e-6 * parameters) < 20


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads the age of a process from /proc")
def test_a_message_finds_the_worker_that_the_one_before_started() -> None:
    command = [sys.executable, "-m", "benchmarks.worker_case", "--quick", "--messages", "2"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ") and "message" not in line]
    assert [(row[0].strip(), row[-1].strip()) for row in rows] == [("1", "1"), ("2", "1"), ("3", "1")]


@pytest.mark.long
def test_a_whole_run_is_held_against_its_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row has the figure of the run and what was said before; nothing is refused, so that digests agree."""
    monkeypatch.setattr(whole, "METHODS", {"ferret": whole.METHODS["ferret"]})
    rows = {row.name: row for row in whole.whole(OPTIONS)}
    assert set(rows) == {f"whole.{what}-ferret-quick" for what in ("seconds", "memory", "client")}
    assert all(row.ours and row.limit for row in rows.values())
    assert not list(whole.whole(replace(OPTIONS, only="fedkseed")))
    assert rows["whole.memory-ferret-quick"].ours > rows["whole.client-ferret-quick"].ours
