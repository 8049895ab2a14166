"""Disks and memory that run out: what the system says in its own words is said in ours."""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.cli.main import _explain
from fedtune.errors import FullLedgerError, ModelError, RunFolderError
from fedtune.ledger_file import explained
from fedtune.run_folder import RunFolder
from fedtune.shortage import memory

RESUME = (
    "import resource, sys; from fedtune.cli import main; import server.app, simulations.engines.in_process; "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1)); main(['simulate', '--resume', sys.argv[1], '--quiet'])"
)


def test_a_limit_on_the_size_of_files_is_named(folder: Path) -> None:
    """ulimit -f: SQLite calls it a disk I/O error."""
    size = (folder / "ledger.sqlite").stat().st_size
    done = subprocess.run([sys.executable, "-c", RESUME, str(folder), str(size)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a limit on the size of files is reached (ulimit -f)" in done.stderr
    assert "I/O error" not in done.stderr


def test_a_file_of_the_folder_that_meets_the_limit_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunFolderError, match=r"a limit on the size of files is reached \(ulimit -f\)"):
            RunFolder(folder).write_bytes("coefficients.bin", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (folder / "coefficients.bin").stat().st_size != 2000


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN])
def test_an_error_of_the_disk_with_a_full_disk_is_one_of_a_full_disk(
    code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A very small disk has no room for SQLite's index of the log, which it calls a disk I/O error."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    monkeypatch.setattr("fedtune.shortage.shutil.disk_usage", lambda path: type("usage", (), {"free": 4096}))
    with (
        pytest.raises(FullLedgerError, match=r"the disk is full\. Free some space and resume"),
        explained(folder / "x"),
    ):
        raise error


def test_an_error_of_the_disk_with_room_stays_one(folder: Path) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    with (
        pytest.raises(Exception, match=r"disk I/O error\. Look for a disk or quota without room") as said,
        explained(folder / "x"),
    ):
        raise error
    assert not isinstance(said.value, FullLedgerError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 549755813888 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    ],
)
def test_too_little_memory_is_said_in_one_sentence(error: Exception) -> None:
    said, code = _explain(error)
    assert said.startswith("Memory is short: ")
    assert "Raise the limit (ulimit -v" in said
    assert code == 1
    wrapped = ModelError("The weights cannot be loaded: get them again.")
    wrapped.__context__ = error
    assert _explain(wrapped)[0].startswith("Memory is short: The weights")


def test_other_errors_are_not_about_memory() -> None:
    for error in (ValueError("out of memory"), OSError(errno.ENOENT, "no such file"), RuntimeError("shapes differ")):
        assert not memory(error)


def test_a_command_with_little_memory_says_so(folder: Path) -> None:
    program = (
        "import resource, sys; from fedtune.cli import main; "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 27), -1)); main(['export', sys.argv[1], '--out', sys.argv[2]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(folder / "out")], capture_output=True, text=True, check=False
    )
    assert "Unexpected" not in done.stderr, done.stderr
    assert "Memory is short" in done.stderr
