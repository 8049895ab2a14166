"""Resuming for real: processes killed with SIGKILL, a run that goes on longer, and everything that is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune import methods
from fedtune.config import RunConfig
from fedtune.errors import (
    DamagedLedgerError,
    ForeignLedgerError,
    FullLedgerError,
    LedgerError,
    LockedLedgerError,
    RunFolderError,
)
from fedtune.ledger import Ledger, Round
from fedtune.ledger_file import LEDGER
from fedtune.resident import release
from fedtune.resume import stored_settings
from fedtune.run_folder import RunFolder
from fedtune.trust import said_now
from fedtune.verify import verify
from simulations.engines.flower_app import config_lines
from tests.laws.federation import config, run

Settings = Callable[..., RunConfig]


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Settings:
    def build(name: str = "fedkseed", **changes: object) -> RunConfig:
        return config(name, tiny_folder, instructions, tmp_path / str(changes.pop("out", "run")), **changes)

    return build


def going_on(before: RunConfig, **changes: object) -> RunConfig:
    return before.replace(**{"resume": before.out, **changes})


def without_summary(folder: str, rounds: int) -> None:
    """Make a finished run look as if it had been killed after some rounds: its files lag and lie."""
    (Path(folder) / "summary.json").unlink()
    (Path(folder) / "coefficients.bin").unlink()
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines(keepends=True)
    (Path(folder) / "metrics.jsonl").write_text("".join(lines[:rounds]) + '{"round": torn')


def test_a_run_that_goes_on_longer_equals_one_that_was_as_long_from_the_start(settings: Settings) -> None:
    whole = run(settings("fedkseed-pro", out="whole", rounds=5))
    part = settings("fedkseed-pro", rounds=2)
    run(part)
    longer = run(going_on(part, rounds=5))
    assert longer.digests == whole.digests
    assert longer.folder.config().rounds == 5
    assert longer.folder.read_json("config.json")["asked"]["rounds"] == 2
    with Ledger.open(longer.folder.path) as ledger:
        assert verify(ledger).rounds == 5
        (event,) = ledger.events("resume")
    assert (event.round, event.detail["settings"]) == (2, {"rounds": 5})


def test_a_resume_keeps_the_rate_that_the_run_began_with(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this fedtune would begin another run with another rate; whoever leaves it open then is refused by name."""
    whole = run(settings("ferret", out="whole", rounds=3, lr=0.0))
    part = settings("ferret", rounds=2, lr=0.0)
    usual = methods.RATES["ferret"]
    assert run(part).folder.read_json("config.json")["used"]["lr"] == usual
    monkeypatch.setitem(methods.RATES, "ferret", 2 * usual)
    before = stored_settings(RunFolder.open(part.out))
    longer = run(said_now(before, {"rounds": 3}).replace(resume=part.out))
    assert longer.digests == whole.digests
    assert longer.folder.config().lr == usual
    with pytest.raises(ForeignLedgerError, match=rf"lr = {usual!r} \(now {2 * usual!r}\)"):
        run(settings("ferret", rounds=4, lr=0.0, resume=part.out))


def test_files_that_lag_or_lie_are_made_again_from_the_ledger(settings: Settings) -> None:
    once = settings("fedkseed-fresh")
    expected = run(once)
    kept = {name: expected.folder.read_bytes(name) for name in ("coefficients.bin", "best_coefficients.bin", "metrics.jsonl")}
    without_summary(once.out, 2)
    (Path(once.out) / "best_coefficients.bin").write_bytes(b"nonsense")
    (Path(once.out) / ".coefficients.bin.1.tmp").write_bytes(b"left by a dead process")
    again = run(going_on(once))
    assert {name: again.folder.read_bytes(name) for name in kept} == kept
    assert again.summary["digest"] == expected.summary["digest"]
    assert not list(Path(once.out).glob(".*"))


def test_a_folder_that_was_moved_goes_on_where_it_is(settings: Settings, tmp_path: Path) -> None:
    once = settings(rounds=1)
    first = run(once)
    shutil.move(once.out, tmp_path / "moved")
    moved = run(once.replace(out=str(tmp_path / "moved"), resume=str(tmp_path / "moved"), rounds=2))
    assert moved.digests[:2] == first.digests
    assert moved.folder.config().out == str(tmp_path / "moved")


def test_another_model_other_data_and_other_settings_are_refused_and_nothing_is_written(
    settings: Settings, tmp_path: Path
) -> None:
    once = settings(rounds=1)
    run(once)
    before = {path.name: path.read_bytes() for path in Path(once.out).iterdir() if "-" not in path.name}
    rows = Path(once.data).read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(rows[:-1]) + rows[-1].replace("Name", "Nome"))
    with pytest.raises(ForeignLedgerError, match="is not what the run started with"):
        run(going_on(once, data=str(tmp_path / "other.jsonl")))
    with pytest.raises(ForeignLedgerError, match="is not the one that the run started from"):
        run(going_on(once, model="embedded"))
    with pytest.raises(ForeignLedgerError, match=r"lr = 0\.001 \(now 0\.5\)"):
        run(going_on(once, lr=0.5))
    with pytest.raises(RunFolderError, match="There is no run folder"):
        run(going_on(once, resume=str(tmp_path / "nothing")))
    assert {path.name: path.read_bytes() for path in Path(once.out).iterdir() if "-" not in path.name} == before


def test_a_damaged_ledger_a_missing_one_and_one_in_use_are_refused(settings: Settings) -> None:
    once = settings(rounds=1)
    run(once)
    with Ledger.open(Path(once.out), writing=True), pytest.raises(LockedLedgerError, match="Another process carries on"):
        run(going_on(once))
    path = Path(once.out) / LEDGER
    whole = path.read_bytes()
    at = whole.index(b"fedkseed")
    path.write_bytes(whole[:at] + b"F" + whole[at + 1 :])
    with pytest.raises(DamagedLedgerError, match="from the header on: its columns do not have its digest"):
        run(going_on(once))
    path.unlink()
    with pytest.raises(LedgerError, match="has rounds but no"):
        run(going_on(once))


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(settings("ferret-fixed", out="whole", rounds=4)).digests
    real = Ledger.commit_round

    def full_in_round_3(self: Ledger, row: Round, *rest: Any, **settings: Any) -> None:
        if row.number == 3:
            pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
            self._connection.execute(f"PRAGMA max_page_count = {pages}")
        real(self, row, *rest, **settings)

    monkeypatch.setattr(Ledger, "commit_round", full_in_round_3)
    once = settings("ferret-fixed", rounds=4)
    with pytest.raises(FullLedgerError, match="the disk is full"):
        run(once)
    assert RunFolder.open(once.out).read_json("error.json")["type"] == "FullLedgerError"
    monkeypatch.undo()
    again = run(going_on(once))
    assert again.digests == expected
    assert not (Path(once.out) / "error.json").exists()


def test_a_resumed_process_that_starts_afresh_ends_the_same(settings: Settings) -> None:
    """Nothing that the digest depends on is kept in the process."""
    expected = run(settings("ferret", out="whole", rounds=3)).digests
    part = settings("ferret", rounds=1)
    run(part)
    release()
    assert run(going_on(part, rounds=3)).digests == expected


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 3])
def test_kill_minus_nine(lines: int, settings: Settings, tmp_path: Path) -> None:
    """A real process, killed in the middle of a client's steps, after some rounds; `fedtune simulate --resume` ends it."""
    once = settings("fedkseed", rounds=4, local_steps=20)
    expected = run(once.replace(out=str(tmp_path / "whole"))).digests
    preset = tmp_path / "preset.toml"
    preset.write_text("\n".join(config_lines(once.replace(out=""))))
    command = [sys.executable, "-m", "fedtune.cli", "simulate"]
    process = subprocess.Popen([*command, str(preset), "--out", once.out, "--quiet"], stderr=subprocess.DEVNULL)
    metrics = Path(once.out) / "metrics.jsonl"
    deadline = time.monotonic() + 600  # a busy machine takes long to import torch
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run([*command, "--resume", once.out, "--quiet", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == expected[-1]
    assert [row["digest"] for row in RunFolder.open(once.out).read_metrics()] == expected
