"""Folders and files that fedtune makes are their owner's alone, whatever the umask; what was there stays as it was."""

from __future__ import annotations

import os
import resource
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune import private, shortage
from fedtune.cli import main
from fedtune.cli.main import _explain
from fedtune.config import RunConfig
from fedtune.control import CONTROL, Command, Order, send
from fedtune.errors import FullLedgerError, RunFolderError
from fedtune.ledger import Header, Ledger, Round, Snapshot
from fedtune.ledger_file import explained
from fedtune.run_folder import RunFolder, replace_file


@pytest.fixture(params=[0o000, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes(folder: Path) -> dict[str, int]:
    """Of `folder` and all in it that is not what it should be."""
    found = {path: mode(path) for path in [folder, *folder.rglob("*")]}
    return {str(path): value for path, value in found.items() if value != (0o700 if path.is_dir() else 0o600)}


def test_folders_are_closed_from_the_first_new_one_on(tmp_path: Path, umask: int) -> None:
    tmp_path.chmod(0o755)
    private.make_folder(tmp_path / "a/b/c")
    assert [mode(tmp_path / name) for name in ("", "a", "a/b", "a/b/c")] == [0o755, 0o700, 0o700, 0o700]
    (tmp_path / "a/b").chmod(0o750)
    private.make_folder(tmp_path / "a/b/c", exist_ok=True)
    assert mode(tmp_path / "a/b") == 0o750
    with pytest.raises(FileExistsError):
        private.make_folder(tmp_path / "a/b/c")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        private.make_folder(tmp_path / "file", exist_ok=True)


def test_the_mode_of_ordinary_files_is_seen(tmp_path: Path, umask: int) -> None:
    assert private.ordinary_mode(tmp_path) == 0o666 & ~umask
    assert not list(tmp_path.iterdir())


def header() -> Header:
    return Header("now", {}, {}, {}, bytes(16), bytes(16), (("w", (2,)),), bytes(32), bytes(8))


def test_a_run_folder_with_its_ledger_and_commands_is_its_owners(tmp_path: Path, umask: int) -> None:
    folder = RunFolder.create(tmp_path / "runs/mine", {}, RunConfig())
    Ledger.create(folder.path, header(), Snapshot(0, 0, b""), Round(0)).close()
    with Ledger.open(folder.path, writing=True) as ledger:
        ledger.commit_round(Round(1, state=b""), (), (), Snapshot(1, 1, b""))
        send(folder, Order(Command.PAUSE))
        folder.append_metrics({"round": 0})
        folder.write_json("status.json", {})
        there = {path.name for path in folder.path.iterdir()}
        assert {"ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", CONTROL, "metrics.jsonl"} <= there
        assert modes(tmp_path / "runs") == {}


def test_a_folder_that_somebody_opened_is_left_open(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", {}, RunConfig())
    folder.path.chmod(0o755)
    before = os.umask(0o027)
    try:
        folder.write_json("status.json", {})
        folder.append_metrics({"round": 0})
    finally:
        os.umask(before)
    assert mode(folder.path) == 0o755
    assert {mode(folder.path / name) for name in ("status.json", "metrics.jsonl")} == {0o640}


def test_what_is_written_elsewhere_follows_the_umask(tmp_path: Path, umask: int) -> None:
    tmp_path.chmod(0o755)
    replace_file(tmp_path / "report.html", b"page")
    assert mode(tmp_path / "report.html") == 0o666 & ~umask


def test_a_whole_run_leaves_nothing_open(tmp_path: Path, umask: int) -> None:
    """The run, its log, its report and its model; the exported model is as everybody's files."""
    run, out = tmp_path / "runs/one", tmp_path / "tuned"
    small = ["--set", "rounds=1", "--set", "local_steps=1", "--set", "eval_samples=4", "--set", "generate_samples=1"]
    for command in (
        ["simulate", "demo_fedkseed", "--out", str(run), *small],
        ["report", str(run)],
        ["export", str(run), "--out", str(out)],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
    assert {"report.html", "log.jsonl", "partition.json", "summary.json"} <= {path.name for path in run.iterdir()}
    assert modes(tmp_path / "runs") == {}
    assert {mode(path) for path in out.iterdir()} == {0o666 & ~umask}


# ---------------------------------------------------------------------------------------------------- disk and memory

_LIMITED = """\
import resource, sys
from pathlib import Path
from test_private import header
from fedtune.errors import FullLedgerError
from fedtune.ledger import Ledger, Round, Snapshot, Used
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
ledger = Ledger.create(Path(sys.argv[1]), header(), Snapshot(0, 0, b""), Round(0))
try:
    for number in range(1, 50):
        ledger.commit_round(Round(number), [Used("a", 1.0, bytes(9000))], (), Snapshot(number, number, b""))
except FullLedgerError as error:
    print(number, error)
"""


def test_a_limit_on_files_is_called_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert "a limit on the size of files is reached (ulimit -f). Free some space and resume the run" in done.stdout
    with Ledger.open(tmp_path) as ledger:
        assert ledger.last == int(done.stdout.split()[0]) - 1


def test_a_disk_without_room_for_the_files_beside_the_ledger_is_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A very small disk: SQLite says "disk I/O error" when it cannot make its index."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    monkeypatch.setattr(shortage.shutil, "disk_usage", lambda path: resource_usage(free=4096))
    with pytest.raises(FullLedgerError, match="the disk is full"), explained(tmp_path / "ledger.sqlite"):
        raise error
    with pytest.raises(RunFolderError, match="size of files is reached"):
        raise_in_run_folder(tmp_path)


def resource_usage(free: int) -> object:
    return type("Usage", (), {"free": free})


def raise_in_run_folder(folder: Path) -> None:
    """Write more than the limit on files allows, in a thread, since the limit is of the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        replace_file(folder / "large", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        ImportError("libgomp.so.1: cannot apply additional memory protection after relocation: Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_too_little_memory_is_called_so(error: Exception) -> None:
    said, code = _explain(error)
    assert said.startswith("Memory is short: ")
    assert code == 1


def test_memory_is_short_also_where_a_library_hides_it() -> None:
    hidden = ValueError("could not load")
    hidden.__context__ = MemoryError()
    assert shortage.memory(hidden)
    assert not shortage.memory(ValueError("out of memory"))  # what a text says that nobody allocated


def test_the_umask_of_other_threads_is_not_touched(tmp_path: Path) -> None:
    seen: list[int] = []
    before = os.umask(0o022)
    try:
        thread = threading.Thread(target=lambda: seen.extend(private.ordinary_mode(tmp_path) for _ in range(50)))
        thread.start()
        for number in range(200):
            (tmp_path / f"file-{number}").touch()
        thread.join()
    finally:
        os.umask(before)
    assert set(seen) == {0o644}
    assert {mode(path) for path in tmp_path.iterdir()} == {0o644}
