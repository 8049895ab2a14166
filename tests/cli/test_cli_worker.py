"""`fedtune worker`: what is there, the end of it, and what it is told wrongly."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playback import Outcome

from client.address import Address, locked
from client.service import Service
from client.version import code_version

Fedtune = Callable[..., Outcome]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fw-", dir="/tmp"))
    monkeypatch.setenv("FEDTUNE_WORKERS", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def running(workers: Path) -> Iterator[Service]:
    one = Service(Address.own("cpu"), "cpu", 0.0)
    yield one
    one.stop()
    one.run()


def test_nobody_is_there(fedtune: Fedtune, workers: Path) -> None:
    assert fedtune("worker", "--status").out == "There is no worker.\n"
    assert fedtune("worker", "--stop").err == "Error: There is no worker to stop.\n"


def test_status_says_who_is_there(fedtune: Fedtune, running: Service) -> None:
    assert fedtune("worker", "--status").out == "There is no worker.\n"  # nobody holds the address yet
    for arguments in ((), ("--address", str(running.address))):
        with locked(running.address.life, 1.0):
            outcome = fedtune("worker", "--status", *arguments)
        assert outcome.code == 0
        lines = outcome.out.splitlines()
        assert lines[0] == str(running.address)
        assert lines[1].startswith(f"  process   {os.getpid()}, fedtune {code_version()}, up ")
        assert lines[2:4] == ["  device    cpu", "  model     none yet (loads: 0)"]
        assert lines[4].startswith("  requests  0 done in ")


def test_stop_ends_the_process_that_holds_the_lock(fedtune: Fedtune, running: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here that is this process, so the signal is caught on its way."""
    released = threading.Event()
    sent: list[int] = []

    def kill(pid: int, number: int) -> None:
        sent.append(pid)
        released.set()

    def hold() -> None:
        with locked(running.address.life, 1.0, write="123456\n"):
            held.set()
            released.wait(30)

    held = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    monkeypatch.setattr("os.kill", kill)
    assert fedtune("worker", "--stop").out == f"stopped the worker at {running.address}\n"
    holder.join()
    assert sent == [123456]


def test_a_second_worker_at_an_address_is_refused(fedtune: Fedtune, workers: Path) -> None:
    with locked(Address.own("cpu").life, 1.0, write="1\n"):
        outcome = fedtune("worker", "--device", "cpu")
    assert (outcome.code, outcome.err.startswith("Error: Another process holds '")) == (1, True)


def test_a_wrong_address_is_refused(fedtune: Fedtune, workers: Path) -> None:
    outcome = fedtune("worker", "--address", "localhost:80")
    assert outcome.code == 1
    assert outcome.err == (
        "Error: 'localhost:80' is not the address of a worker: write unix:/absolute/path or tcp:/absolute/path.\n"
    )
