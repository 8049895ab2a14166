"""A run killed at any write goes on to the digest of the run that was never killed. The writes are enumerated."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import fedtune.beside
from fedtune.config import RunConfig
from fedtune.ledger import Ledger
from fedtune.run_folder import RunFolder
from fedtune.verify import verify
from tests.laws.federation import ALGORITHMS, config, run
from tests.server.crashes import Crashes, watching

pytestmark = pytest.mark.faults

Build = Callable[..., RunConfig]
MADE = ("coefficients.bin", "best_coefficients.bin", "partition.json")


@pytest.fixture
def build(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Build:
    def make(name: str, **changes: object) -> RunConfig:
        small = {"rounds": 2, "local_steps": 2, "clients_per_round": 2, "eval_samples": 4, **changes}
        (tmp_path / "here").mkdir(exist_ok=True)
        return config(name, tiny_folder, instructions, tmp_path / "here" / "run", **small)

    return make


def end_of(folder: Path) -> tuple[object, ...]:
    """What has to be the same whatever happened on the way: digests, losses, updates, the files made from the ledger."""
    found = RunFolder.open(folder)
    rows = [(row["round"], row["digest"], row["eval_loss"], row["clients"]) for row in found.read_metrics()]
    with Ledger.open(folder) as ledger:
        checked = verify(ledger)
    names = sorted(path.name for path in folder.iterdir() if not path.name.endswith(("-wal", "-shm")))
    files = [found.read_bytes(name) for name in MADE]
    return (found.summary()["digest"], checked.digest, checked.updates, rows, names, *files)


def watched(settings: RunConfig, into: Path, monkeypatch: pytest.MonkeyPatch) -> Crashes:
    """Run to the end and keep every crash point."""
    into.mkdir()
    crashes = Crashes(Path(settings.out).parent, into)
    with watching(crashes, monkeypatch):
        run(settings)
    return crashes


def resume_all(settings: RunConfig, folders: Mapping[str, Path], expected: tuple[object, ...]) -> int:
    """Resume in every folder and compare the ends; returns how many there were. A run that never began leaves none."""
    begun = 0
    for moment, folder in folders.items():
        there = folder / "run"
        if there.exists():
            begun += 1
            run(settings.replace(out=str(there), resume=str(there)))
            assert end_of(there) == expected, moment
        shutil.rmtree(folder)
    return begun


def test_every_crash_point_leads_to_the_same_end(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds with fresh pools: each flush, rename and commit, before, after and torn."""
    settings = build("fedkseed-fresh")
    crashes = watched(settings, tmp_path / "crashes", monkeypatch)
    assert crashes.writes > 40
    assert sum("torn commit" in moment for moment in crashes.folders) > 30
    assert resume_all(settings, crashes.folders, end_of(Path(settings.out))) > 60


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept"])
def test_every_crash_point_of_a_run_with_large_states_leads_to_the_same_end(
    kept: bool, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States and updates lie in files beside the ledger (here from 200 bytes on): also killed at the writes of those."""
    monkeypatch.setattr(fedtune.beside, "LARGE", 200)
    settings = build("fedavg", keep_updates=kept)
    crashes = watched(settings, tmp_path / "crashes", monkeypatch)
    moments = {moment: folder for moment, folder in crashes.folders.items() if "torn commit" not in moment}
    assert sum(".new" in moment for moment in moments) > 20
    assert resume_all(settings, moments, end_of(Path(settings.out))) > 40


def test_every_crash_point_of_a_resume_leads_to_the_same_end(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose files lag behind its ledger is resumed, killed again at every write of that, and resumed again."""
    settings = build("ferret-fixed", rounds=1)
    commits = watched(settings, tmp_path / "first", monkeypatch).folders
    expected = end_of(Path(settings.out))
    shutil.rmtree(settings.out)
    shutil.copytree([folder for moment, folder in commits.items() if "after a commit" in moment][-2] / "run", settings.out)
    crashes = watched(settings.replace(resume=settings.out), tmp_path / "second", monkeypatch)
    assert end_of(Path(settings.out)) == expected
    assert resume_all(settings, crashes.folders, expected) > 15


@pytest.mark.parametrize("name", ALGORITHMS)
def test_resume_equals_never_stopped(name: str, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed right after each commit, for every algorithm of the law tests."""
    settings = build(name, rounds=3)
    crashes = watched(settings, tmp_path / "crashes", monkeypatch)
    commits = {moment: folder for moment, folder in crashes.folders.items() if "after a commit" in moment}
    assert resume_all(settings, commits, end_of(Path(settings.out))) >= 6
