"""A whole federation in this process: what it returns, and how it ends early."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune import progress
from fedtune.errors import DataError, Interrupted, RunFolderError
from fedtune.run_folder import RunFolder
from simulations.engines.in_process import run_in_process


@pytest.mark.parametrize("algorithm", ["fedkseed", "ferret"])
def test_the_summary_is_that_of_the_run_folder_and_repeats(small, algorithm):
    first, again, other = (
        run_in_process(small(name, algorithm=algorithm, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    folder = RunFolder.open(str(first["out"]))
    assert folder.summary() == first
    assert [row["round"] for row in folder.read_metrics()] == [0, 1, 2]
    assert first["digest"] == again["digest"] != other["digest"]
    assert first["updates_refused"] == 0


def test_without_a_folder_one_is_chosen_in_the_working_directory(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = run_in_process(small("").replace(out="", rounds=1))
    out = Path(str(summary["out"]))
    assert out.parent == tmp_path / "runs"
    assert out.name.startswith("fedkseed-")
    assert RunFolder.open(out).summary() == summary


def test_errors_of_the_server_come_out_as_they_are(small, tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        run_in_process(small("a", data=str(tmp_path / "missing.jsonl")))
    (tmp_path / "there").mkdir()
    with pytest.raises(RunFolderError, match="exists already"):
        run_in_process(small("there"))


def test_a_stop_between_the_steps_of_a_client_keeps_the_finished_rounds(small, tmp_path):
    def stop_in_second_round(event: progress.Event) -> None:
        if isinstance(event, progress.RoundStarted) and event.round == 2:
            progress.request_stop()

    steps: list[progress.Event] = []
    try:
        with pytest.raises(Interrupted), progress.listening(stop_in_second_round), progress.listening(steps.append):
            run_in_process(small("a"))
    finally:
        progress.clear_stop()
    assert [row["round"] for row in RunFolder.open(tmp_path / "a").read_metrics()] == [0, 1]
    assert sum(isinstance(event, progress.ClientStep) for event in steps) < 2 * 4 * 3
