"""The worker as a process, over a real socket: the same bytes, one load, and what happens when somebody dies or stops."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from client import connection
from client.address import Address
from client.connection import greet, stop
from client.forwarder import Forwarder
from client.identity import Identity
from client.worker import Worker
from fedtune.config import RunConfig
from fedtune.errors import DeadlineError, Interrupted, StaleReplicaError, WorkerStartError
from fedtune.progress import ClientStep, Event, Note, clear_stop, listening, request_stop
from tests.client.conftest import MakeInstruction, wait_until
from tests.client.federation import rounds

ROOT = Path(__file__).parents[2]
WHO = Identity("0", 0)
EMBEDDED = RunConfig(device="cpu", threads=1, clients=4, local_steps=40, K=64)

pytestmark = pytest.mark.slow  # a worker imports torch: seconds


def forwarder(config: RunConfig, seconds: float = 120.0, idle: float = 120.0) -> Forwarder:
    return Forwarder(None, config, "1", seconds, idle)


def at(config: RunConfig) -> Address:
    return Address.own(config.device)


FORWARD = """
import sys
from client.connection import greet
from client.address import Address
from client.forwarder import Forwarder
from client.identity import Identity
from fedtune.config import RunConfig
config = RunConfig.from_mapping(__import__("json").loads(sys.argv[1]))
update, _ = Forwarder(None, config, "1", 120.0, 120.0).train(Identity("0", 0), bytes.fromhex(sys.argv[2]), [])
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(greet(Address.own(config.device)).pid, update.hex())
"""


def client_process(config: RunConfig, message: bytes) -> subprocess.Popen[str]:
    """Another process that forwards `message`; it prints the worker's pid and the update."""
    arguments = [sys.executable, "-c", FORWARD, config.model_dump_json(), message.hex()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_starters_get_one_worker_which_gives_the_same_bytes(workers: Path, instruction: MakeInstruction) -> None:
    message = instruction(EMBEDDED)
    expected, _ = Worker(EMBEDDED).train(WHO, message, [])
    both = [client_process(EMBEDDED, message) for _ in range(2)]
    outputs = [process.communicate()[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    first = greet(at(EMBEDDED))
    assert outputs == [[str(first.pid), expected.hex()]] * 2
    assert (workers / at(EMBEDDED).log.name).read_text().count("process") == 1

    heard: list[Event] = []
    with listening(heard.append):
        assert forwarder(EMBEDDED).train(WHO, message, [])[0] == expected
    steps = [event for event in heard if isinstance(event, ClientStep)]
    assert [event.step for event in steps] == list(range(1, 41))
    assert {(event.client, event.steps) for event in steps} == {("0", 40)}
    last = greet(at(EMBEDDED))
    assert (last.pid, last.loads, last.requests, last.placed) == (first.pid, 1, 3, "cpu")
    assert last.fingerprint == Worker(EMBEDDED).introduce(WHO).fingerprint
    assert forwarder(EMBEDDED).introduce(WHO) == Worker(EMBEDDED).introduce(WHO)

    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in [workers, *workers.iterdir()]}
    assert modes == {"": 0o700, ".sock": 0o600, ".life": 0o600, ".start": 0o600, ".log": 0o600}

    update, keep = forwarder(EMBEDDED).train(Identity("1", 1), message, [])
    assert update != expected
    assert keep == Worker(EMBEDDED).train(Identity("1", 1), message, [])[1]  # the open pool, for the next round
    assert stop(at(EMBEDDED), 30.0)
    assert not list(workers.glob("*.sock"))
    assert greet(at(EMBEDDED)) is None
    assert not stop(at(EMBEDDED), 1.0)


@pytest.mark.faults
def test_a_killed_worker_is_started_again_and_the_answer_is_right(workers: Path, instruction: MakeInstruction) -> None:
    config = EMBEDDED.replace(local_steps=200)
    message = instruction(config)
    expected, _ = Worker(config).train(WHO, message, [])
    killed: list[int] = []
    notes: list[Note] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, ClientStep) and event.step == 3 and not killed:
            killed.append(at(config).pid() or 0)
            os.kill(killed[0], signal.SIGKILL)
        if isinstance(event, Note):
            notes.append(event)

    with listening(kill_once):
        assert forwarder(config).train(WHO, message, [])[0] == expected
    assert greet(at(config)).pid != killed[0]
    assert "is started again" in notes[-1].text


@pytest.mark.faults
def test_a_worker_that_dies_twice_is_an_error(workers: Path, instruction: MakeInstruction) -> None:
    config = EMBEDDED.replace(local_steps=2000)

    def kill(event: Event) -> None:
        if isinstance(event, ClientStep) and (pid := at(config).pid()):
            os.kill(pid, signal.SIGKILL)

    with (
        listening(kill),
        pytest.raises(WorkerStartError, match=r"ended twice during its work \(not enough memory\?\): see '.*log'"),
    ):
        forwarder(config).train(WHO, instruction(config), [])


@pytest.mark.faults
def test_deadline_cancel_and_death_of_the_caller_stop_the_work_and_the_worker_stays(
    workers: Path, instruction: MakeInstruction
) -> None:
    endless = EMBEDDED.replace(local_steps=1_000_000)
    message, short = instruction(endless), instruction(EMBEDDED)
    expected, _ = forwarder(EMBEDDED).train(WHO, short, [])
    pid = at(EMBEDDED).pid()
    steps: list[int] = []

    with pytest.raises(DeadlineError, match=r"deadline of 2 s passed: its work was stopped\. Raise round_timeout"):
        forwarder(endless, seconds=2.0).train(WHO, message, [])
    wait_until(lambda: greet(at(EMBEDDED)).busy == 0)

    def stop_soon(event: Event) -> None:
        if isinstance(event, ClientStep):
            steps.append(event.step)
            if event.step == 5:
                request_stop()

    try:
        with listening(stop_soon), pytest.raises(Interrupted):
            forwarder(endless).train(WHO, message, [])
    finally:
        clear_stop()
    assert steps == [1, 2, 3, 4, 5]
    wait_until(lambda: greet(at(EMBEDDED)).busy == 0)

    caller = client_process(endless, message)
    wait_until(lambda: greet(at(EMBEDDED)).busy == 1)
    caller.kill()
    caller.communicate()
    wait_until(lambda: greet(at(EMBEDDED)).busy == 0)

    assert forwarder(EMBEDDED).train(WHO, short, [])[0] == expected
    assert (greet(at(EMBEDDED)).pid, greet(at(EMBEDDED)).loads) == (pid, 1)


@pytest.mark.faults
def test_a_request_is_done_by_another_worker_when_its_own_is_stopped(workers: Path, instruction: MakeInstruction) -> None:
    config = EMBEDDED.replace(local_steps=200)
    message = instruction(config)
    expected, _ = Worker(config).train(WHO, message, [])
    stopped: list[threading.Thread] = []

    def stop_once(event: Event) -> None:
        if isinstance(event, ClientStep) and event.step == 3 and not stopped:
            stopped.append(threading.Thread(target=stop, args=(at(config), 30.0)))
            stopped[0].start()

    with listening(stop_once):
        assert forwarder(config).train(WHO, message, [])[0] == expected
    stopped[0].join()


@pytest.mark.faults
def test_a_hung_worker_is_killed_and_replaced(
    workers: Path, instruction: MakeInstruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = forwarder(EMBEDDED).train(WHO, instruction(EMBEDDED), [])
    hung = at(EMBEDDED).pid() or 0
    os.kill(hung, signal.SIGSTOP)
    monkeypatch.setattr(connection, "GREETING_SECONDS", 1.0)
    monkeypatch.setattr(connection, "HUNG_SECONDS", 2.0)
    assert forwarder(EMBEDDED).train(WHO, instruction(EMBEDDED), [])[0] == expected
    assert at(EMBEDDED).pid() != hung


@pytest.mark.faults
def test_a_worker_of_other_sources_is_replaced(
    workers: Path, instruction: MakeInstruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = "import client.version as v; v.code_version = lambda: '0.0.9+old'; import client.service as s; s.main()"
    command = [sys.executable, "-c", old, "--address", str(at(EMBEDDED)), "--device", "cpu", "--idle", "60"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_until(lambda: greet(at(EMBEDDED)) is not None)
    assert greet(at(EMBEDDED)).version == "0.0.9+old"
    update, _ = forwarder(EMBEDDED).train(WHO, instruction(EMBEDDED), [])
    assert update == Worker(EMBEDDED).train(WHO, instruction(EMBEDDED), [])[0]
    assert process.wait(30) == 0
    assert at(EMBEDDED).pid() != process.pid


@pytest.mark.faults
def test_it_ends_when_idle_when_terminated_and_when_nobody_can_reach_it(workers: Path, settings: RunConfig) -> None:
    for end in ("idle", "term", "gone"):
        forwarder(settings, idle=2.0 if end == "idle" else 120.0).introduce(WHO)
        pid = at(settings).pid()
        assert pid
        if end == "term":
            os.kill(pid, signal.SIGTERM)
        if end == "gone":
            at(settings).path.unlink()
        wait_until(lambda: at(settings).pid() is None)
        assert not at(settings).path.exists()
    assert "Traceback" not in at(settings).log.read_text()


def test_a_killed_worker_leaves_a_socket_that_is_cleared_away_and_a_terminated_one_none(
    workers: Path, settings: RunConfig
) -> None:
    forwarder(settings, idle=77.0).introduce(WHO)
    assert greet(at(settings)).idle_seconds == 77.0  # its service ends after them: tests/client/test_service.py
    os.kill(at(settings).pid() or 0, signal.SIGKILL)
    wait_until(lambda: at(settings).pid() is None)
    assert at(settings).path.exists()
    assert forwarder(settings).introduce(WHO).client == "0"
    os.kill(at(settings).pid() or 0, signal.SIGTERM)
    wait_until(lambda: at(settings).pid() is None)
    assert not at(settings).path.exists()
    assert "Traceback" not in at(settings).log.read_text()


def test_what_a_client_kept_is_in_the_worker_too(workers: Path, settings: RunConfig, instruction: MakeInstruction) -> None:
    """A SuperNode that restarts loses the pools of its context; the worker still has them, and drops wrong ones."""
    settings = settings.replace(algorithm="ferret", K=200, pool_every=1, rounds=3, local_steps=2, lr=1e-2, eps=5e-4)
    lost = rounds(settings, forget_state=True, worker="auto")
    kept = rounds(settings, forget_state=False, worker="off")
    assert lost.digest == kept.digest
    assert kept.problems == []
    assert lost.problems == []
    nobody = rounds(settings, forget_state=True, worker="off")
    assert nobody.digest == kept.digest
    assert StaleReplicaError.__name__ in nobody.problems


def test_a_start_that_fails_says_why(workers: Path, settings: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ROOT", workers)
    monkeypatch.setenv("PYTHONPATH", str(workers))
    (workers / "client.py").write_text("")
    with pytest.raises(WorkerStartError, match=r"ended with code 1 as it started: .*client\.service"):
        forwarder(settings).introduce(WHO)


def test_an_address_that_is_not_ours_to_start_is_waited_for(
    workers: Path, settings: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = Address.parse(f"unix:{workers}/mine.sock")
    monkeypatch.setattr(connection, "START_SECONDS", 0.5)
    with pytest.raises(WorkerStartError, match=r"No worker answers at unix:.*mine\.sock: start it there \(`fedtune worker"):
        Forwarder(address, settings, "1", 60.0).introduce(WHO)
    assert not list(workers.glob("*.life"))

    monkeypatch.setattr(connection, "START_SECONDS", 60.0)
    command = [sys.executable, "-m", "fedtune.cli", "worker", "--address", str(address), "--device", "cpu"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        assert Forwarder(address, settings, "1", 60.0).introduce(WHO).examples > 0
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
