"""Real SuperLink, proxy and SuperNodes on loopback, from the files and through the scripts of `fedtune deploy init`."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from federations import NODES, TINY, Federation, process_of
from loopback import RUN_SECONDS, Loopback, alone, change, fedtune, free_ports, programs, wait_until

from fedtune.config import RunConfig
from fedtune.deploy.check.network import server_from_here
from fedtune.records import LARGE
from simulations.engines.in_process import run_in_process

pytestmark = pytest.mark.deployment


def ask(federation: Federation, method: str, path: str, body: bytes | None = None) -> int:
    """The status of an answer at the public port."""
    loopback = federation.loopback
    context = ssl.create_default_context(cafile=str(loopback.server / "ca.pem"))
    connection = http.client.HTTPSConnection("127.0.0.1", loopback.public, timeout=10, context=context)
    try:
        connection.request(method, path, body, {"Content-Type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_only_the_fleet_api_is_reachable(federation: Federation) -> None:
    """However a path is spelled: dots, encoded dots, doubled slashes, detours."""
    for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/x", "/health", "/openapi.json", "/docs"):
        for detour in ("", "/v1/fleet/..", "/v1/fleet/%2e%2e/..", "/", "/v1/fleet/x/../../..", "/v1/fleet/%2e%2e%2f.."):
            for method in ("GET", "POST"):
                assert ask(federation, method, detour + path) in (400, 403, 404), f"{method} {detour + path}"


def test_the_fleet_api_wants_a_signature_and_takes_large_bodies(federation: Federation) -> None:
    assert ask(federation, "POST", "/v1/fleet/pull-messages", b"") == 401
    assert ask(federation, "POST", "/v1/fleet/pull-messages?x=1", b"") == 401
    assert ask(federation, "GET", "/v1/fleet/pull-messages") == 403
    assert ask(federation, "POST", "/v1/fleet/push-object", bytes(6 << 20)) in (400, 401, 422)  # nginx's own limit: 413


def test_check_finds_nothing_wrong(federation: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    def served() -> int:
        """How many nodes' SuperNodes have taken their port: they start by themselves, seconds after the server."""
        assert fedtune("deploy", "check", str(federation.loopback.folder), "--json") == 0
        found.update(json.loads(capsys.readouterr().out))
        return sum("is used by the SuperNode, process" in finding["text"] for finding in found["findings"])

    found: dict[str, Any] = {}
    assert wait_until(lambda: served() == 2)
    assert {finding["role"] for finding in found["findings"]} == {"server", "0", "1"}
    texts = [finding["text"] for finding in found["findings"]]
    assert sum("refuses a call without signature" in text for text in texts) == 3
    assert sum("(the server's)" in text for text in texts) == 3  # the weights


@pytest.fixture(scope="module")
def strangers(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of SuperNodes that must not get in."""
    loopback = federation.loopback
    assert fedtune("deploy", "init", str(loopback.folder), "--add-node", "unregistered") == 0
    other = Loopback(tmp_path_factory.mktemp("other") / "federation", ["0"])
    folders = {"unregistered": loopback.node("unregistered"), "wrong CA": loopback.folder / "wrong"}
    shutil.copytree(loopback.node("unregistered"), folders["wrong CA"])
    shutil.copy(other.server / "ca.pem", folders["wrong CA"] / "ca.pem")
    for folder, port in zip(folders.values(), free_ports(2), strict=True):
        change(folder / "node.env", BIN=programs(), RUNTIME_PORT=str(port), MODEL="/m", DATA="/d")
    with ThreadPoolExecutor() as pool:
        return dict(zip(folders, pool.map(lambda folder: alone(folder, "supernode.sh"), folders.values()), strict=True))


def test_a_node_that_is_not_registered_is_refused(strangers: dict[str, tuple[int, str]]) -> None:
    code, said = strangers["unregistered"]
    assert code != 0
    assert "305" in said
    assert "2004" in said


def test_a_server_of_another_ca_is_refused(strangers: dict[str, tuple[int, str]]) -> None:
    code, said = strangers["wrong CA"]
    assert code != 0
    assert "305" in said
    assert "certificate" in said.lower()


def test_a_run_ends_like_its_simulation(federation: Federation, tmp_path: Path) -> None:
    """Also: models and data are each node's own, nothing is installed, and the operator's script tells success."""
    done = federation.loopback.run(federation.preset("run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished:completed" in done.stdout
    summary = json.loads((federation.folder / "run" / "summary.json").read_text())
    assert summary["updates_refused"] == 0
    assert summary["digest"] == federation.simulated["digest"]


def test_a_run_whose_messages_are_as_large_as_the_model_ends_like_its_simulation(
    federation: Federation, tmp_path: Path
) -> None:
    """FedAvg: 1.6 MB both ways, as arrays that Flower cuts, through the proxy and the workers."""
    changes = {"algorithm": "fedavg", "lr": 1e-2, "K": 1024, "eps": 5e-4}
    simulated = run_in_process(RunConfig.from_mapping({**TINY, **changes, "out": str(tmp_path / "simulated")}))
    done = federation.loopback.run(federation.preset("large", **changes))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((federation.folder / "large" / "summary.json").read_text())
    assert summary["payload_bytes_up_per_client_round"] > LARGE
    assert summary["digest"] == simulated["digest"]


@pytest.mark.faults
def test_a_killed_proxy_comes_back(federation: Federation) -> None:
    """While it is away, SuperNodes try again; none of them ends."""
    loopback = federation.loopback
    before = [process_of(loopback.node(name), b"client.supernode") for name in NODES]
    killed = process_of(loopback.server, b"nginx: master")
    os.kill(killed, signal.SIGKILL)
    assert wait_until(lambda: "proxy.sh ended with exit code 137" in loopback.says(loopback.server))
    assert wait_until(lambda: all(finding.state == "ok" for finding in server_from_here(loopback.place)))
    assert process_of(loopback.server, b"nginx: master") != killed
    time.sleep(4)  # a SuperNode without work asks every 3 s
    assert [process_of(loopback.node(name), b"client.supernode") for name in NODES] == before
    listed = json.loads(loopback.call("flwr.sh", "supernode", "list", "deployment", "--format", "json").stdout)
    assert sum(node["status"] == "online" for node in listed["nodes"]) == len(NODES)


@pytest.mark.faults
def test_a_killed_supernode_comes_back_and_the_run_ends(federation: Federation) -> None:
    loopback, node = federation.loopback, federation.loopback.node("1")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loopback.run, federation.preset("killed", rounds=8))
        assert wait_until(lambda: len(federation.rows("killed")) > 1, RUN_SECONDS), "round 1 did not end"
        killed = process_of(node, b"client.supernode")
        os.kill(killed, signal.SIGKILL)
        done = running.result()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = federation.rows("killed")
    assert len(rows) == 1 + 8
    assert rows[-1]["refused"] == {}
    assert rows[-1]["clients"] == ["0", "1"]
    assert process_of(node, b"client.supernode") != killed
    assert "supernode.sh ended with exit code 137; next start in 3 s" in loopback.says(node)
