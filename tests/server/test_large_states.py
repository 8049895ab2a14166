"""Runs whose states and updates are large: they lie beside the ledger, and every promise of the ledger holds for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fedtune.beside
import fedtune.scratch
from fedtune.beside import FOLDER, is_reference
from fedtune.config import RunConfig
from fedtune.errors import DamagedLedgerError, LedgerError
from fedtune.ledger import Ledger
from fedtune.ledger_file import LEDGER
from fedtune.replay import Rules, replay
from fedtune.verify import verify
from tests.laws.federation import config, lying, run

Settings = Callable[..., RunConfig]


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Settings:
    def make(name: str = "fedavg", out: str = "run", **changes: object) -> RunConfig:
        return config(name, tiny_folder, instructions, tmp_path / out, **{"rounds": 2, "local_steps": 2, **changes})

    return make


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows hold 200 bytes and memory nothing: what is larger lies in files."""
    monkeypatch.setattr(fedtune.beside, "LARGE", 200)
    monkeypatch.setattr(fedtune.scratch, "IN_MEMORY", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["fedavg", "fedavg-16bit", "ferret-fixed", "fedkseed-fresh"])
def test_where_values_lie_changes_nothing(
    name: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same digests and the same files with and without room, of any algorithm; and a late resume ends the same."""
    with_room = run(settings(name))
    with monkeypatch.context() as patch:
        patch.setattr(fedtune.beside, "LARGE", 200)
        patch.setattr(fedtune.scratch, "IN_MEMORY", 0)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        without = run(settings(name, out="without"))
        assert without.digests == with_room.digests
        assert without.folder.read_bytes("coefficients.bin") == with_room.folder.read_bytes("coefficients.bin")
        with Ledger.open(without.folder.path) as ledger:
            assert verify(ledger).digest == with_room.digests[-1]
            assert is_reference(ledger.snapshot.arrays)
        once = settings(name, out="once", rounds=1)
        run(once)
        assert run(once.replace(resume=once.out, rounds=2)).digests == with_room.digests


@pytest.mark.usefixtures("small_rows")
def test_the_folder_holds_what_rows_name_and_one_snapshot_more(settings: Settings) -> None:
    found = run(settings(rounds=3))
    with Ledger.open(found.folder.path) as ledger:
        rows = [used.payload for number in range(4) for used in ledger.updates(number)] + [ledger.snapshot.arrays]
    names = {stored[len(fedtune.beside.MARK) : -8].hex() for stored in rows}
    there = {path.name for path in (found.folder.path / FOLDER).iterdir()}
    assert names <= there
    assert len(there - names) == 1  # of the round before, for who reads it now
    assert (found.folder.path / LEDGER).stat().st_size < 100_000
    assert {os.stat(found.folder.path / FOLDER / name).st_mode & 0o777 for name in there} == {0o600}


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("what", ["update", "snapshot"])
@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_a_damaged_file_is_found_by_its_name_and_nothing_is_lost(what: str, harm: str, settings: Settings) -> None:
    once = settings()
    run(once)
    folder = Path(once.out)
    with Ledger.open(folder) as ledger:
        stored = ledger.snapshot.arrays if what == "snapshot" else ledger.updates(1)[0].payload
    path = folder / FOLDER / stored[len(fedtune.beside.MARK) : -8].hex()
    whole = path.read_bytes()
    if harm == "flipped":
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    else:
        path.unlink()
    with Ledger.open(folder) as ledger, pytest.raises(DamagedLedgerError, match=path.name):
        verify(ledger)
    others = {other.name for other in path.parent.iterdir()}
    if what == "snapshot":
        with pytest.raises(DamagedLedgerError, match=path.name):
            run(once.replace(resume=once.out, rounds=3))
        assert {other.name for other in path.parent.iterdir()} == others
    path.write_bytes(whole)
    run(once.replace(resume=once.out, rounds=3))
    with Ledger.open(folder) as ledger:
        assert verify(ledger).rounds == 3


@pytest.mark.usefixtures("small_rows")
def test_the_update_of_a_liar_leaves_no_file(settings: Settings) -> None:
    """Refused ones are removed with the round, and what is longer than an update can be is never written."""
    cheat, silent = lying(lambda payload: payload[:-4] + b"\x00\x00\xc0\x7f")  # a NaN at the end
    quick = {"round_timeout": 1.0, "grace": 0.0}  # the silent one is not waited for
    lied = run(settings(**quick), faults=cheat)
    honest = run(settings(out="honest", **quick), faults=silent)
    assert lied.digests == honest.digests
    assert any("not finite" in reason for reason in lied.refused.values())
    there = [len(list((found.folder.path / FOLDER).iterdir())) for found in (lied, honest)]
    assert there[0] == there[1]
    shutil.rmtree(lied.folder.path)
    longer, _ = lying(lambda payload: payload + bytes(len(payload)))
    again = run(settings(), faults=longer)
    sizes = [path.stat().st_size for path in (again.folder.path / FOLDER).iterdir()]
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.usefixtures("small_rows")
def test_updates_that_are_not_kept_leave_the_same_run_and_cannot_be_replayed(settings: Settings) -> None:
    whole = run(settings(rounds=3))
    once = settings(out="lean", rounds=2, keep_updates=False)
    run(once)
    lean = run(once.replace(resume=once.out, rounds=3))
    assert lean.digests == whole.digests
    assert lean.folder.read_bytes("best_coefficients.bin") == whole.folder.read_bytes("best_coefficients.bin")
    with Ledger.open(Path(once.out)) as ledger:
        payloads = {used.payload for number in range(4) for used in ledger.updates(number)}
        names = {stored[len(fedtune.beside.MARK) : -8].hex() for stored in payloads if is_reference(stored)}
        assert names
        assert not names & {path.name for path in (Path(once.out) / FOLDER).iterdir()}
        found = verify(ledger)
        assert (found.digest, found.updates, found.replayed) == (whole.digests[-1], len(payloads), False)
        with pytest.raises(LedgerError, match="were not kept"):
            list(replay(ledger, Rules.of(ledger.header)))
    (Path(once.out) / FOLDER / ledger_state(once)).write_bytes(b"other")
    with Ledger.open(Path(once.out)) as ledger, pytest.raises(DamagedLedgerError):
        verify(ledger)


@pytest.mark.usefixtures("small_rows")
def test_a_resume_frees_the_disk_of_updates(settings: Settings) -> None:
    once = settings()
    before = run(once)
    files = len(list((Path(once.out) / FOLDER).iterdir()))
    after = run(once.replace(resume=once.out, keep_updates=False))
    assert after.digests == before.digests
    assert len(list((Path(once.out) / FOLDER).iterdir())) < files
    with Ledger.open(Path(once.out)) as ledger:
        assert not verify(ledger).replayed


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("kept", [True, False])
def test_another_model_does_not_stay_as_the_best_one(kept: bool, settings: Settings) -> None:
    """With updates, the best model is made again; without, a file that holds another one is removed."""
    once = settings(keep_updates=kept, lr=3.0)
    found = run(once)
    losses = [row["eval_loss"] for row in found.folder.read_metrics()]
    assert min(losses) < losses[-1], "the best model is not the last one, which is always there"
    path = found.folder.path / "best_coefficients.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes(16) + whole[56:])
    run(once.replace(resume=once.out))
    assert path.exists() == kept
    if kept:
        assert path.read_bytes() == whole


def test_updates_that_fit_in_a_row_are_kept_and_replayed_all_the_same(settings: Settings) -> None:
    once = settings("ferret", keep_updates=False)
    run(once)
    with Ledger.open(Path(once.out)) as ledger:
        assert verify(ledger).replayed


def ledger_state(once: RunConfig) -> str:
    """The name of the file of the state of a run."""
    with Ledger.open(Path(once.out)) as ledger:
        return ledger.snapshot.arrays[len(fedtune.beside.MARK) : -8].hex()
