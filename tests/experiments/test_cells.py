"""Many runs: each once, carried on where they stopped, never over another run. Real processes, a tiny model."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.cli.main import main
from fedtune.config import RunConfig
from fedtune.errors import LedgerError, RunFolderError
from fedtune.experiments.cells import Cell, Finished, as_toml, run_cells
from fedtune.ledger import Ledger
from fedtune.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        model=str(tiny_folder), data=str(instructions), rounds=2, clients=2, clients_per_round=2, local_steps=2,
        K=64, min_samples=1, template="plain", max_length=64, threads=1, device="cpu", holdout=0.2, out=str(tmp_path / "one"),
    )  # fmt: skip


def test_runs_are_made_once_and_carried_on(settings: RunConfig, tmp_path: Path) -> None:
    good = Cell("good", settings)
    bad = Cell("bad", settings.replace(data=str(tmp_path / "nothing.jsonl"), out=str(tmp_path / "two")))
    seen: list[Finished] = []
    first = run_cells([good, bad], workers=2, progress=seen.append)
    assert (first[0].problem, first[0].again) == ("", True)
    assert first[0].summary is not None
    assert first[0].summary["rounds"] == 2
    assert first[1].summary is None
    assert "nothing.jsonl" in first[1].problem
    assert {finished.outcome.cell.name for finished in seen} == {"good", "bad"}

    again = run_cells([good], workers=1)[0]
    assert (again.again, again.summary) == (False, first[0].summary)

    longer = run_cells([Cell("good", settings.replace(rounds=3))], workers=1)[0]
    assert (longer.again, longer.problem) == (True, "")
    rows = RunFolder.open(settings.out).read_metrics()
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["digest"] == first[0].summary["digest"]  # the rounds that were there stayed

    with pytest.raises(RunFolderError, match=r"was made with lr = 1e-05 \(now 0.5\)"):
        run_cells([Cell("other", settings.replace(rounds=3, lr=0.5))])


def test_the_preset_of_a_cell_has_all_its_settings(settings: RunConfig, tmp_path: Path) -> None:
    odd = settings.replace(instruction_column='a "quoted" one', lr=3e-5)
    (tmp_path / "cell.toml").write_text(as_toml(odd))
    assert RunConfig.load(tmp_path / "cell.toml", {"out": settings.out}) == odd


def nobody_holds(folder: Path) -> bool:
    """Whether no process writes to the run in `folder`."""
    try:
        with Ledger.open(folder, writing=True):
            return True
    except LedgerError:
        return False


def wait_until(fact: Callable[[], bool], seconds: float = 120.0) -> bool:
    until = time.monotonic() + seconds
    while not fact() and time.monotonic() < until:
        time.sleep(0.1)
    return fact()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(end, marks=pytest.mark.faults) for end in (signal.SIGTERM, signal.SIGKILL))]
)
def test_a_request_to_end_stops_the_runs_and_the_same_command_carries_them_on(
    settings: RunConfig, tmp_path: Path, number: signal.Signals
) -> None:
    text = as_toml(settings.replace(rounds=20, local_steps=10)) + "[arms.fedkseed]\n"
    (tmp_path / "long.toml").write_text(text)
    command = ["compare", str(tmp_path / "long.toml"), "--seeds", "1", "--out", str(tmp_path / "out")]
    folder = tmp_path / "out" / "runs" / "fedkseed" / "seed-0"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedtune.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert wait_until((folder / "best_coefficients.bin").exists)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, said
        assert "the same command carries on" in said
    assert wait_until(lambda: nobody_holds(folder))
    assert len(RunFolder.open(folder).read_metrics()) < 21
    with pytest.raises(SystemExit) as ended:  # in this process, whose fork server has imported everything
        main(command)
    assert ended.value.code == 0
    assert len(RunFolder.open(folder).read_metrics()) == 21
