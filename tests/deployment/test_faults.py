"""Real processes of a deployment are killed, lie and come late, and the run ends where it would have ended without that."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from federations import TINY, Federation, answers, process_of
from flwr.app import Context, Message
from liar import LIES, REASONS
from loopback import RUN_SECONDS, Loopback, change, environment, fedtune, free_ports, programs, wait_until

import client.app
import server.app
from client.address import Address
from client.connection import greet
from fedtune.config import RunConfig
from fedtune.control import is_live
from fedtune.deploy.settings import read
from fedtune.ledger import Ledger
from fedtune.run_folder import RunFolder
from fedtune.verify import verify
from simulations.engines.in_process import run_in_process
from simulations.engines.local_grid import LocalGrid

pytestmark = [pytest.mark.deployment, pytest.mark.faults]


def workers_of(node: Path) -> list[Address]:
    """Where the workers of a node listen."""
    kinds = {".sock": "unix", ".port": "tcp"}
    return [Address(kinds[path.suffix], path) for path in (node / "workers").glob("*") if path.suffix in kinds]


def busy_worker(node: Path) -> int:
    """The process that trains for a node now; 0 if none does."""
    said = [found for address in workers_of(node) if (found := greet(address)) is not None]
    return next((found.pid for found in said if found.busy), 0)


def test_killed_superlink_server_and_worker_and_two_resumes_end_like_a_run_that_was_never_stopped(
    federation: Federation,
) -> None:
    """kill -9 of the SuperLink in the middle of a round, of the ServerApp between two, of a node's worker in a step."""
    loopback, rounds, out = federation.loopback, 5, federation.folder / "killed-server"
    whole = {**TINY, "rounds": rounds, "local_steps": 60}
    expected = run_in_process(RunConfig.from_mapping({**whole, "out": str(federation.folder / "never-stopped")}))
    first = federation.preset("killed-server", rounds=rounds, local_steps=60)
    resumed = federation.preset("resumed", rounds=rounds, local_steps=60, resume=str(out))
    with ThreadPoolExecutor(3) as pool:
        run = pool.submit(loopback.run, first)
        assert wait_until(lambda: len(federation.rows("killed-server")) > 1 and busy_worker(loopback.node("0")), RUN_SECONDS)
        os.kill(process_of(loopback.server, b"flower-superlink"), signal.SIGKILL)
        assert run.result().returncode != 0
        assert wait_until(lambda: answers(loopback.place) and not is_live(out))
        stopped_at = len(federation.rows("killed-server"))

        second = pool.submit(loopback.run, resumed)
        assert wait_until(lambda: is_live(out))
        assert fedtune("pause", str(out)) == 0
        assert wait_until(lambda: RunFolder.open(out).read_json("status.json")["doing"] == "paused")
        os.kill(int(str(RunFolder.open(out).read_json("status.json")["pid"])), signal.SIGKILL)
        assert wait_until(lambda: not is_live(out))
        assert len(federation.rows("killed-server")) >= stopped_at

        third = pool.submit(loopback.run, resumed)
        assert wait_until(lambda: is_live(out) and busy_worker(loopback.node("1")), RUN_SECONDS)
        os.kill(busy_worker(loopback.node("1")), signal.SIGKILL)
        done = third.result()
        assert second.result().returncode != 0
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunFolder.open(out).summary()["digest"] == expected["digest"]
    rows = federation.rows("killed-server")
    assert [row["digest"] for row in rows] == [row["digest"] for row in federation.rows("never-stopped")]
    assert all(row["refused"] == {} for row in rows)


# ---------------------------------------------------------------------------------------------------- a liar, a late client

LATE = 5  # the first round, of ten, of the late client


@dataclass
class Eventful:
    """A run with a client that lied and one that came late; `files` has the data of each client."""

    folder: RunFolder
    config: RunConfig
    files: dict[str, str]

    def rows(self) -> list[dict[str, object]]:
        return self.folder.read_metrics()


@contextmanager
def liars_worker() -> Iterator[str]:
    """The address of a worker that lies."""
    with tempfile.TemporaryDirectory(prefix="fl-", dir="/tmp") as folder:  # short, for a socket
        address = f"unix:{folder}/liar.sock"
        process = subprocess.Popen([sys.executable, Path(__file__).with_name("liar.py"), address, "cpu"], env=environment())
        try:
            yield address
        finally:
            process.terminate()
            process.wait()


def add(federation: Federation, name: str, like: str, **settings: str) -> Path:
    """Register one more node, with the model and the rows of another; it is not started."""
    loopback = federation.loopback
    assert fedtune("deploy", "init", str(loopback.folder), "--add-node", name) == 0
    assert loopback.call("register.sh").returncode == 0
    theirs = read(loopback.node(like) / "node.env")
    same = {key: theirs[key] for key in ("MODEL", "DATA", "DEVICE")}
    change(loopback.node(name) / "node.env", BIN=programs(), RUNTIME_PORT=str(free_ports(1)[0]), **same, **settings)
    return loopback.node(name)


@pytest.fixture(scope="module")
def eventful(federation: Federation) -> Iterator[Eventful]:
    """Ten rounds with two honest clients, a liar, and one that comes after round 4."""
    loopback = federation.loopback
    settings = {"rounds": 10, "clients": 4, "min_clients": 3, "clients_per_round": 4, "eval_every": 0}
    preset, out = federation.preset("eventful", **settings), federation.folder / "eventful"
    with liars_worker() as worker, ThreadPoolExecutor(1) as pool:
        liar, late = add(federation, "liar", "0", WORKER=worker), add(federation, "late", "1")
        try:
            loopback.start(liar)
            assert wait_until(lambda: online(loopback) == 3)
            running = pool.submit(loopback.run, preset)
            assert wait_until(lambda: len(federation.rows("eventful")) == LATE - 1, RUN_SECONDS)
            assert fedtune("pause", str(out)) == 0  # after round 4, which has begun
            assert wait_until(lambda: RunFolder.open(out).read_json("status.json")["doing"] == "paused")
            loopback.start(late)
            assert wait_until(lambda: "Client late joins" in (out / "log.jsonl").read_text())
            assert fedtune("unpause", str(out)) == 0
            done = running.result()
            assert done.returncode == 0, done.stdout + done.stderr
            files = {name: read(loopback.node(name) / "node.env")["DATA"] for name in ("0", "1", "late", "liar")}
            yield Eventful(RunFolder.open(out), RunConfig.from_mapping({**TINY, **settings}), files)
        finally:
            for name, machine in (("liar", liar), ("late", late)):
                loopback.stop(machine)
                loopback.call("remove.sh", name)
                shutil.rmtree(machine)


def online(loopback: Loopback) -> int:
    """How many SuperNodes are connected."""
    listed = json.loads(loopback.call("flwr.sh", "supernode", "list", "deployment", "--format", "json").stdout)
    return sum(node["status"] == "online" for node in listed["nodes"])


@pytest.mark.parametrize("number", LIES)
def test_what_a_liar_sends_is_refused_by_name(eventful: Eventful, number: int) -> None:
    """Garbage, NaN, two wrong lengths, a reply to an old round, and the same reply twice."""
    refused = eventful.rows()[number]["refused"]
    assert isinstance(refused, dict)
    assert set(refused) == {"liar"}
    assert refused["liar"].startswith(REASONS[number])


def test_a_client_that_was_never_there_joins_in_round_five_of_ten(eventful: Eventful) -> None:
    """It answers the first round in which it is asked, from the server's model: its digest was checked there."""
    rows, early = eventful.rows(), ["0", "1", "liar"]
    asked = [sorted(row["clients"]) for row in rows[1:]]  # type: ignore[call-overload]
    assert asked == [early] * (LATE - 1) + [sorted([*early, "late"])] * (11 - LATE)
    assert all(row["refused"] == {} for row in rows[len(LIES) + 1 :])


def test_lies_and_late_clients_change_nothing_else(eventful: Eventful, tmp_path: Path) -> None:
    """In process, the same schedule, in which those clients are not there when they lied or had not come."""
    with Ledger.open(eventful.folder.path) as ledger:
        used = {row.number: {update.client for update in ledger.updates(row.number)} for row in ledger.rounds()}
        assert verify(ledger).rounds == 10
    names = list(eventful.files)

    def handler(message: Message, context: Context) -> Message:
        number = int(message.metadata.group_id or 0)
        if number and context.node_config["client-id"] not in used[number]:
            raise RuntimeError("not there")
        return client.app.app(message, context)

    nodes = {place: {"client-id": name, "data": eventful.files[name]} for place, name in enumerate(names)}
    config = eventful.config.replace(out=str(tmp_path / "same"))
    grid = LocalGrid(handler, 4, config.as_mapping(), node_configs=nodes)
    server.app.app(grid, grid.server_context())
    same = RunFolder.open(config.out).read_metrics()
    assert [row["digest"] for row in same] == [row["digest"] for row in eventful.rows()]
