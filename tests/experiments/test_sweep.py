"""Sweeps: what each rung runs, what is dropped, and that an interrupted one is carried on; most on made-up losses."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedtune.config import RunConfig
from fedtune.errors import Interrupted, RunFolderError
from fedtune.experiments import sweep as sweep_module
from fedtune.experiments.cells import Cell, Finished, Outcome, run_cells
from fedtune.experiments.grid import Axis, grid
from fedtune.experiments.halving import rungs
from fedtune.experiments.sweep import Plan, Progress, run_sweep
from fedtune.ledger import Ledger


def plan(out: Path, rates: Sequence[float], seeds: int = 1, rounds: int = 8, base: RunConfig | None = None) -> Plan:
    config = (base or RunConfig()).replace(rounds=rounds)
    combinations = tuple(grid(config, [Axis("lr", tuple(rates))]))
    return Plan(combinations, tuple(range(seeds)), rungs(rounds, 3, 0.5), 0.5, out)


@dataclass
class MadeUp:
    """Stands in for processes: the loss of a run is |log10 lr + 3| + seed / 100, and lr above 1 fails."""

    ran: list[tuple[str, int]] = field(default_factory=list)
    stop_after: int = 10**9
    lengths: dict[str, int] = field(default_factory=dict)

    def run(
        self, cells: Sequence[Cell], *, workers: int = 0, progress: Callable[[Finished], None] | None = None
    ) -> list[Outcome]:
        outcomes = []
        for cell in cells:
            if len(self.ran) == self.stop_after:
                raise Interrupted("Stopped.")
            self.ran.append((cell.name, cell.settings.rounds))
            self.lengths[cell.settings.out] = cell.settings.rounds
            failed = cell.settings.lr > 1.0
            outcomes.append(Outcome(cell, None if failed else {}, "No client returned a usable update." if failed else ""))
            if progress:
                progress(Finished(outcomes[-1], len(outcomes), len(cells)))
        return outcomes

    def loss(self, folder: str | Path, rounds: int) -> float:
        name = Path(folder).name
        return abs(math.log10(float(name.split("_")[1])) + 3.0) + int(name.split("_")[-1]) / 100 if rounds else 9.0


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    fake = MadeUp()
    monkeypatch.setattr(sweep_module, "run_cells", fake.run)
    monkeypatch.setattr(sweep_module, "loss_after", fake.loss)
    monkeypatch.setattr(sweep_module, "_is_there", lambda cell: fake.lengths.get(cell.settings.out, 0) >= cell.settings.rounds)
    return fake


def test_the_better_half_is_carried_on_and_what_diverged_never_is(made_up: MadeUp, tmp_path: Path) -> None:
    results = run_sweep(plan(tmp_path, (1e-5, 1e-4, 1e-3, 10.0)))
    assert [(name.split()[0], rounds) for name, rounds in made_up.ran] == [
        ("lr=1e-05", 2), ("lr=0.0001", 2), ("lr=0.001", 2), ("lr=10.0", 2),
        ("lr=0.0001", 4), ("lr=0.001", 4),
        ("lr=0.001", 8),
    ]  # fmt: skip
    assert [(result.combination.values["lr"], result.rounds) for result in results] == [
        (1e-3, 8),
        (1e-4, 4),
        (1e-5, 2),
        (10.0, 2),
    ]
    assert [result.stopped for result in results] == [
        "",
        "not among the best 1 of 2 after 4 rounds",
        "not among the best 2 of 4 after 2 rounds",
        "seed 0: No client returned a usable update.",
    ]


def test_a_loss_that_blew_up_is_dropped_though_it_is_finite(
    made_up: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "loss_after", lambda folder, rounds: 50.8 if rounds else 4.7)
    results = run_sweep(plan(tmp_path, (1e-5, 1e-4)))
    assert [one.rounds for one in results] == [2, 2]
    assert results[0].stopped == "seed 0: diverged: held-out loss 50.8 after 2 rounds, 4.7 before the first"


def test_seeds_are_averaged_and_their_spread_is_known(made_up: MadeUp, tmp_path: Path) -> None:
    best = run_sweep(plan(tmp_path, (1e-4, 1e-3), seeds=3))[0]
    assert best.losses == pytest.approx((0.0, 0.01, 0.02))
    assert (best.mean, best.spread) == pytest.approx((0.01, 0.01))


def test_an_interrupted_sweep_is_carried_on_without_repeating(made_up: MadeUp, tmp_path: Path) -> None:
    wanted = plan(tmp_path, (1e-5, 1e-4, 1e-3))
    made_up.stop_after = 4  # inside the second rung
    with pytest.raises(Interrupted):
        run_sweep(wanted)
    made_up.stop_after = 10**9
    first = list(made_up.ran)
    results = run_sweep(wanted)
    assert len(set(made_up.ran)) == len(made_up.ran)
    assert made_up.ran[: len(first)] == first
    assert results == run_sweep(wanted)


def test_more_values_are_added_to_a_sweep(made_up: MadeUp, tmp_path: Path) -> None:
    run_sweep(plan(tmp_path, (1e-5, 1e-4)))
    before = len(made_up.ran)
    assert run_sweep(plan(tmp_path, (1e-5, 1e-4, 1e-3)))[0].combination.values == {"lr": 1e-3}
    assert {name for name, _ in made_up.ran[before:]} <= {"lr=0.001 seed=0", "lr=0.0001 seed=0"}


def test_progress_counts_runs_knows_the_best_and_the_time_left(made_up: MadeUp, tmp_path: Path) -> None:
    heard: list[Progress] = []
    run_sweep(plan(tmp_path, (1e-5, 1e-3)), told=heard.append)
    assert [(one.rung, one.finished.done, one.finished.total) for one in heard] == [(0, 1, 2), (0, 2, 2), (1, 1, 1), (2, 1, 1)]
    assert heard[1].best == (0.0, "lr=0.001 seed=0")
    assert all(one.seconds_left is not None and one.seconds_left >= 0.0 for one in heard)
    assert heard[-1].seconds_left == 0.0


# ---------------------------------------------------------------------- real processes


def test_real_runs_are_resumed_to_the_digest_of_one_that_never_stopped(tiny_preset: Path, tmp_path: Path) -> None:
    """A run of 1, then 2, then 4 rounds ends as one of 4; the worse rate is not carried on."""
    base = RunConfig.load(tiny_preset)
    wanted = plan(tmp_path / "sweep", (1e-3, 1e6), rounds=4, base=base)
    results = run_sweep(wanted, workers=2)
    assert [result.rounds for result in results] == [4, 1]
    assert results[1].stopped == "not among the best 1 of 2 after 1 rounds"  # at 1e6 its loss is that of a uniform guess
    whole = Cell("whole", base.replace(lr=1e-3, out=str(tmp_path / "whole")))
    (outcome,) = run_cells([whole])
    assert outcome.summary is not None
    with Ledger.open(tmp_path / "sweep" / "lr_0.001_seed_0") as ledger:
        assert (ledger.last, ledger.round(4).state.hex()) == (4, outcome.summary["digest"])
    with pytest.raises(RunFolderError, match=r"K = 64 \(now 128\): give another folder with --out"):
        run_sweep(plan(tmp_path / "sweep", (1e-3,), rounds=4, base=base.replace(K=128)))


@pytest.mark.faults
def test_a_killed_sweep_is_carried_on(tiny_preset: Path, tmp_path: Path) -> None:
    """The sweep's process dies after the first rung; the same command ends it, with the first rung's runs as they were."""
    killed = (
        "import os, sys; from fedtune.experiments import sweep; from fedtune.cli import main\n"
        "real, calls = sweep.run_cells, []\n"
        "def run_cells(cells, **options):\n"
        "    calls.append(1)\n"
        "    return os._exit(9) if len(calls) == 2 else real(cells, **options)\n"
        "sweep.run_cells = run_cells\n"
        "main(sys.argv[1:])"
    )
    line = ["sweep", str(tiny_preset), "--over", "K=32,64", "--rungs", "2", "--out", str(tmp_path / "s"), "--set", "rounds=2"]
    first = subprocess.run([sys.executable, "-c", killed, *line], capture_output=True, text=True, check=False)
    assert first.returncode == 9, first.stderr
    headers = {path.parent.name: path.stat().st_ino for path in (tmp_path / "s").glob("*/ledger.sqlite")}
    assert sorted(headers) == ["K_32_seed_0", "K_64_seed_0"]
    again = subprocess.run([sys.executable, "-m", "fedtune.cli", *line], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "stage 1" not in again.stdout
    assert "stage 2 of 2 (to round 2), run 1 of 1" in again.stdout
    assert {path.parent.name: path.stat().st_ino for path in (tmp_path / "s").glob("*/ledger.sqlite")} == headers
    assert (tmp_path / "s" / "sweep.csv").read_text().startswith("K,rounds,seeds,loss,spread,base_loss,stopped,folder")
