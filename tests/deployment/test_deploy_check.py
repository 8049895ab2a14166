"""What `fedtune deploy check` finds: one thing is made wrong at a time, and it is named with its fix."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from loopback import change, fedtune, free_ports, programs
from pretenders import Answer, pretending, proxy

from fedtune.deploy.certificates import Authority, Pair
from fedtune.deploy.check import Finding, State, check_deployment
from fedtune.deploy.check.machine import packages
from fedtune.deploy.check.network import Place, beyond_loopback, own_port, parse_address, server_from_here
from fedtune.embedded import embedded_path
from fedtune.errors import DeployError


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture
def node(written: Path) -> Path:
    """A node's folder with all filled in; no server runs."""
    port, runtime = free_ports(2)
    folder = written / "nodes" / "a"
    change(
        folder / "node.env",
        BIN=programs(),
        MODEL=str(embedded_path("model")),
        DATA=str(embedded_path("tasks.jsonl")),
        DEVICE="cpu",
        RUNTIME_PORT=str(runtime),
        SERVER=f"127.0.0.1:{port}",
    )
    return folder


def problems(findings: list[Finding]) -> dict[str, str]:
    """What is wrong: check -> text and fix."""
    return {finding.check: f"{finding.text} {finding.fix}" for finding in findings if finding.state is State.problem}


@pytest.fixture
def network(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """What is said about a server that shows `pair`, answers by `answer` and `ahead` seconds behind a clock that stands."""
    now = float(int(time.time()))  # HTTP's date has whole seconds
    monkeypatch.setattr("fedtune.deploy.check.network.time", SimpleNamespace(time=lambda: now))

    def look(
        pair: Pair | None = None,
        answer: Answer = proxy,
        ahead: float = 0.0,
        name: str = "127.0.0.1",
        trusted: Authority | None = None,
    ) -> dict[str, str]:
        shown = pair or authority.issue(["127.0.0.1"])
        paths = [tmp_path / name for name in ("shown.pem", "shown.key", "trusted.pem")]
        for path, text in zip(paths, (shown.certificate, shown.key, (trusted or authority).pair.certificate), strict=True):
            path.write_bytes(text)
        with pretending(paths[0], paths[1], answer, now - ahead) as port:
            return problems(list(server_from_here(Place("127.0.0.1", port, name, paths[2]))))

    return look


def test_a_server_as_it_should_be(network: Callable[..., dict[str, str]]) -> None:
    assert network() == {}


def test_a_certificate_that_is_refused_is_explained(network: Callable[..., dict[str, str]], authority: Authority) -> None:
    expired = authority.issue(["127.0.0.1"], days=-2)
    assert "expired" in network(expired)["certificate"]
    assert "--renew" in network(expired)["certificate"]
    assert "'fl.example.org' to \"hosts\"" in network(name="fl.example.org")["certificate"]
    assert "copy ca.pem" in network(trusted=Authority.create())["certificate"]


def test_clocks_that_differ_are_found_before_signatures_are_refused(network: Callable[..., dict[str, str]]) -> None:
    assert "60 s ahead of the server's" in network(ahead=60)["clock"]
    assert "timedatectl" in network(ahead=60)["clock"]
    assert "400 s behind" in network(ahead=-400)["clock"]
    assert "clock" not in network(ahead=-60)


def test_an_exposed_control_api_is_the_loudest(network: Callable[..., dict[str, str]]) -> None:
    found = network(answer=lambda method, path: 401 if "fleet" in path else 200 if path == "/health" else 415)
    assert "POST /v1/control/list-nodes (415)" in found["control API"]
    assert "GET /health (200)" in found["control API"]
    assert "Stop it now" in found["control API"]


def test_a_proxy_without_superlink_and_one_that_is_not_ours(network: Callable[..., dict[str, str]]) -> None:
    assert "no SuperLink behind it (502)" in network(answer=lambda method, path: 502 if "fleet" in path else 404)["fleet API"]
    assert "answers 404" in network(answer=lambda method, path: 404)["fleet API"]


def test_a_port_that_is_not_there_and_one_that_speaks_otherwise(tmp_path: Path, authority: Authority) -> None:
    (tmp_path / "ca.pem").write_bytes(authority.pair.certificate)
    [port] = free_ports(1)
    found = problems(list(server_from_here(Place("127.0.0.1", port, "127.0.0.1", tmp_path / "ca.pem"))))
    assert "cannot be reached (Connection refused). Start the proxy" in found["server"]
    found = problems(list(server_from_here(Place("nowhere.invalid", port, "nowhere.invalid", tmp_path / "ca.pem"))))
    assert "DNS" in found["server"]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.bind(("0.0.0.0", 0))
        listening.listen()
        listening.settimeout(0)
        yield listening


def test_a_port_that_is_taken(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.deploy.check.network.SECONDS", 0.3)
    [free] = free_ports(1)
    assert own_port("proxy", "the proxy", free)[0].state is State.ok
    finding, runs = own_port("proxy", "the proxy", listener.getsockname()[1])
    assert "taken by another program" in finding.text
    assert not runs


def test_a_superlink_beyond_loopback(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.deploy.check.network._addresses", lambda hosts: ["127.0.0.3"])
    [finding] = beyond_loopback(["fl.example.org"], listener.getsockname()[1])
    assert finding.state is State.problem
    assert "127.0.0.1 only" in finding.fix
    [finding] = beyond_loopback([], free_ports(1)[0])
    assert finding.state is State.ok


def test_addresses_are_read_with_their_port() -> None:
    assert parse_address("fl.example.org:8443") == ("fl.example.org", 8443)
    assert parse_address("[2001:db8::5]:443") == ("2001:db8::5", 443)
    for text in ("fl.example.org", ":8443", "x:0", "x:y", "x:99999", ""):
        with pytest.raises(ValueError, match="is not host:port"):
            parse_address(text)


# ------------------------------------------------------------------ files and the machine


def test_a_node_that_only_lacks_its_server(node: Path) -> None:
    assert set(problems(check_deployment(node))) == {"server"}


def test_a_node_as_written_lacks_model_and_data(written: Path) -> None:
    found = problems(check_deployment(written, "b"))
    assert "MODEL is empty. Set MODEL" in found["model"]
    assert "DATA is empty. Set DATA" in found["data"]


def test_keys_that_others_can_read_and_keys_that_do_not_belong_here(node: Path) -> None:
    (node / "node.key").chmod(0o640)
    assert "chmod 600" in problems(check_deployment(node))["keys"]
    (node / "node.key").chmod(0o600)
    shutil.copy(node.parents[1] / "ca" / "ca.key", node)
    assert "the key of the CA" in problems(check_deployment(node))["keys"]
    (node / "node.key").unlink()
    assert "cannot be read" in "".join(finding.text for finding in check_deployment(node) if finding.check == "keys")


def test_a_kind_of_key_that_flower_refuses(node: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    openssh = serialization.PrivateFormat.OpenSSH
    (node / "node.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption()))
    assert "Ed25519 key, which Flower refuses (exit code 302)" in problems(check_deployment(node))["node key"]
    (node / "node.key").write_text("nonsense")
    assert "not an OpenSSH private key" in problems(check_deployment(node))["node key"]


@pytest.mark.parametrize(
    ("setting", "value", "check", "said"),
    [
        ("MODEL", "model", "model", "is not absolute"),
        ("MODEL", "/nowhere", "model", "no model folder"),
        ("MODEL_FINGERPRINT", "0" * 32, "model", "Copy the server's model folder"),
        ("DATA", "rows.jsonl", "data", "is not absolute"),
        ("DATA", "/nowhere.jsonl", "data", "no data file"),
        ("DATA", "/etc/passwd", "data", "of no kind"),
        ("DEVICE", "cuda:9", "device", "not on this machine"),
        ("SERVER", "fl.example.org", "server", "host:port"),
        ("RUNTIME_PORT", "many", "runtime port", "is not a port"),
        ("BIN", "/nowhere", "programs", "Set BIN"),
        ("BIN", "/usr/bin", "programs", "flwr-clientapp"),
        ("CLIENT_ID", 'a"b', "settings", "has a quote"),
    ],
)
def test_a_setting_of_a_node_that_is_wrong(node: Path, setting: str, value: str, check: str, said: str) -> None:
    change(node / "node.env", **{setting: value})
    assert said in problems(check_deployment(node))[check]


def test_a_python_without_fedtune(node: Path, tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o700)
    change(node / "node.env", BIN=str(tmp_path))
    assert "cannot import client.supernode" in problems(check_deployment(node))["SuperNode"]


def test_who_has_the_runtime_port(node: Path, listener: socket.socket) -> None:
    port = str(listener.getsockname()[1])
    change(node / "node.env", RUNTIME_PORT=port)
    [finding] = [finding for finding in check_deployment(node) if finding.check == "runtime port"]
    assert finding.state is State.warning
    sleeper = "import time; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", sleeper, "client.supernode", "--port", port], stdout=subprocess.PIPE) as it:
        assert it.stdout is not None
        it.stdout.readline()
        [finding] = [finding for finding in check_deployment(node) if finding.check == "runtime port"]
        it.kill()
    assert finding.state is State.ok
    assert f"process {it.pid}" in finding.text


def test_data_without_rows(node: Path, tmp_path: Path) -> None:
    for content, said in (("", "has no rows"), ("{", "not valid JSON at line 1")):
        (tmp_path / "rows.jsonl").write_text(content)
        change(node / "node.env", DATA=str(tmp_path / "rows.jsonl"))
        assert said in problems(check_deployment(node))["data"]


def test_packages_that_are_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(list(packages())) == {}
    lines = ["flwr[simulation]<1.42,>=1.41", "torch>=99", "no-such-package>=1", "pytest>=99; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    texts = [finding.text for finding in packages()]
    assert texts == [
        f"torch>=99 is needed, and torch {metadata.version('torch')} is installed.",
        "no-such-package>=1 is needed, and no-such-package is not installed.",
    ]


def test_a_full_disk(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8))
    assert "0.1 GB free" in problems(check_deployment(node))["disk"]


def test_a_server_before_its_start(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin") is None:
        pytest.skip("no nginx: apt install nginx-light")
    server = ready(written)
    monkeypatch.chdir(server)
    assert problems(check_deployment(Path())) == {}
    change(server / "server.env", PUBLIC_PORT="1234", HOSTS="localhost fl.example.org")
    found = problems(check_deployment(server))
    assert "Make both the same" in found["proxy"]
    assert "not for 'fl.example.org' of HOSTS" in found["certificate"]
    shutil.copy(written / "server" / "superlink.key", server / "server.key")
    found = [finding.text for finding in check_deployment(server) if finding.state is State.problem]
    assert any("do not belong together" in text for text in found)
    assert any("nginx refuses nginx.conf" in text for text in found)


def ready(written: Path) -> Path:
    """The server's folder with free ports."""
    public, superlink = free_ports(2)
    server = written / "server"
    change(server / "server.env", BIN=programs(), PUBLIC_PORT=str(public), SUPERLINK_PORT=str(superlink))
    text = (server / "nginx.conf").read_text()
    (server / "nginx.conf").write_text(text.replace(":8443 ", f":{public} ").replace(":8000;", f":{superlink};"))
    return server


def test_the_command_exits_with_one_if_anything_is_wrong(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedtune("deploy", "check", str(written), "--role", "b", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == sum(finding["state"] == "problem" for finding in found["findings"]) > 0
    assert all(finding["fix"] for finding in found["findings"] if finding["state"] != "ok")
    assert fedtune("deploy", "check", str(written / "nodes" / "b")) == 1
    assert "MODEL is empty" in capsys.readouterr().out


def test_a_folder_or_role_that_is_not_there(written: Path, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"no folder of a deployment \(server.env, node.env or deployment.json"):
        check_deployment(tmp_path)
    with pytest.raises(DeployError, match="has no role 'c': it has server, a, b"):
        check_deployment(written, "c")
