"""Nothing that a run started survives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from simulations.engines import processes
from simulations.engines.processes import end_all, ending_on_signals, living, undisturbed

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes through /proc")

# A leader with a child that ignores SIGTERM and has left its session.
TREE = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True, cwd=sys.argv[1], env=eval(sys.argv[2]))
time.sleep(60)
"""


def start(code: str, home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A process with `home` as FLWR_HOME that has printed a first line."""
    environment = {**os.environ, "FLWR_HOME": str(home)}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize("known_by", ["environment", "folder"])
def test_stubborn_grandchildren_are_found_and_ended(tmp_path, monkeypatch, known_by):
    monkeypatch.setattr(processes, "END_SECONDS", 0.3)
    home = tmp_path / "home"
    home.mkdir()
    child = {"environment": ("/", {"FLWR_HOME": str(home)}), "folder": (str(home), {})}[known_by]
    leader = start(TREE, home, child[0], repr(child[1]))
    assert leader.stdout is not None
    with leader.stdout:
        assert len(living(home)) == 2
        assert end_all(home, leader)
    assert living(home) == []
    assert leader.returncode == -signal.SIGTERM


def test_other_processes_are_left_alone(tmp_path):
    home, other = tmp_path / "home", tmp_path / "home-of-another"
    for folder in (home, other):
        folder.mkdir()
    bystander = start("import time; print('up', flush=True); time.sleep(60)", other)
    try:
        assert end_all(home, None)
        assert bystander.poll() is None
        assert living(other) == [bystander.pid]
    finally:
        bystander.kill()
        bystander.communicate()


def test_sigterm_runs_the_finally_clauses():
    code = """
        import time
        from simulations.engines.processes import ending_on_signals
        with ending_on_signals():
            try:
                print("up", flush=True)
                time.sleep(60)
            finally:
                print("cleaned", flush=True)
    """
    process = start(code, Path("/nowhere"))
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert output == b"cleaned\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_handlers_of_others_stay_and_ours_go():
    own = signal.signal(signal.SIGTERM, lambda number, frame: None)
    hangup = signal.getsignal(signal.SIGHUP)
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with ending_on_signals():
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGHUP) != hangup
    finally:
        signal.signal(signal.SIGTERM, own)
    assert signal.getsignal(signal.SIGHUP) == hangup


def test_ctrl_c_does_not_interrupt_the_cleaning():
    before = signal.getsignal(signal.SIGINT)
    with undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    assert signal.getsignal(signal.SIGINT) is before
