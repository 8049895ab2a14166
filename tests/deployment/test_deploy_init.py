"""What `fedtune deploy init` writes: whose key is where, for whom it is readable, and what stays when a part is changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from loopback import change, fedtune, wait_until

from fedtune.deploy import settings
from fedtune.deploy.certificates import covers, names_of
from fedtune.deploy.plan import Plan
from fedtune.deploy.server import nginx_conf
from fedtune.deploy.weights import weights_fingerprint
from fedtune.embedded import embedded_path
from fedtune.errors import DeployError, ModelError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("umask", [0o000, 0o027])
def test_everything_is_its_owners_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(umask)
    try:
        assert fedtune("deploy", "init", str(tmp_path / "a/b/c"), "--server", "fl.example.org", "--nodes", "a,b") == 0
        assert fedtune("deploy", "init", str(tmp_path / "a/b/c"), "--add-node", "d") == 0
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {path for path, mode in modes.items() if mode != 0o600} == {path for path in modes if path.is_dir() or _runs(path)}
    assert {mode for path, mode in modes.items() if path.is_file() and _runs(path)} == {0o700}
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def _runs(path: Path) -> bool:
    return path.suffix == ".sh" and path.name != "environment.sh"


def test_private_keys_are_where_they_belong(written: Path) -> None:
    keys = sorted(path.relative_to(written).as_posix() for path in written.rglob("*.key"))
    assert keys == ["ca/ca.key", "nodes/a/node.key", "nodes/b/node.key", "server/server.key", "server/superlink.key"]
    assert not list(written.rglob("*.new"))


def test_a_machine_gets_what_it_needs_and_no_more(written: Path) -> None:
    scripts = {"environment.sh", "start.sh", "supernode.sh", "supervise.sh"}
    others = {"ca.pem", "node.env", "node.key", "fedtune-supernode.service"}
    assert set(contents(written / "nodes" / "a")) == scripts | others
    private = {path: path.read_bytes() for path in written.rglob("*.key")}
    for path in written.rglob("*"):
        if path.is_file() and path not in private:
            assert b"PRIVATE KEY" not in path.read_bytes()


def test_certificates_are_for_the_given_names_and_state_their_time(tmp_path: Path) -> None:
    names = ["--server", "fl.example.org", "--server", "203.0.113.5", "--server", "2001:db8::5"]
    assert fedtune("deploy", "init", str(tmp_path / "d"), *names, "--nodes", "a") == 0
    server = certificate(tmp_path / "d/server/server.pem")
    assert set(names_of(server)) == {"fl.example.org", "203.0.113.5", "2001:db8::5", "localhost", "127.0.0.1", "::1"}
    assert all(covers(names_of(server), host) for host in ("FL.example.org", "2001:DB8:0::5"))
    assert not covers(names_of(server), "example.org")
    server.verify_directly_issued_by(certificate(tmp_path / "d/ca/ca.pem"))
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days == 825
    assert set(names_of(certificate(tmp_path / "d/server/superlink.pem"))) == {"localhost", "127.0.0.1", "::1"}
    assert "825 days" in (tmp_path / "d/README.md").read_text()
    assert settings.read(tmp_path / "d/nodes/a/node.env")["SERVER"] == "fl.example.org:8443"


def test_node_keys_are_of_the_kind_that_flower_takes(written: Path) -> None:
    private = serialization.load_ssh_private_key((written / "nodes/a/node.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((written / "server/nodes/a.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert private.public_key() == public
    assert (written / "server/nodes/a.pub").read_bytes() != (written / "server/nodes/b.pub").read_bytes()


def test_nothing_is_overwritten_without_force(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(written)
    again = ["deploy", "init", str(written), "--server", "localhost", "--nodes", "a,c"]
    assert fedtune(*again) == 1
    assert "exists" in (said := capsys.readouterr().err)
    assert "--force" in said
    assert contents(written) == before
    assert fedtune(*again, "--force") == 0
    assert contents(written)["ca/ca.key"] != before["ca/ca.key"]


def test_a_node_is_added_without_touching_the_rest(written: Path) -> None:
    before = contents(written)
    assert fedtune("deploy", "init", str(written), "--add-node", "c", "--add-node", "d") == 0
    after = contents(written)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"README.md", "deployment.json"}
    assert {name.split("/")[1] for name in set(after) - set(before) if name.startswith("nodes/")} == {"c", "d"}
    assert {name for name in set(after) - set(before) if not name.startswith("nodes/")} == {
        "server/nodes/c.pub",
        "server/nodes/d.pub",
    }
    ports = [settings.read(written / "nodes" / name / "node.env")["RUNTIME_PORT"] for name in "abcd"]
    assert len(set(ports)) == 4
    assert fedtune("deploy", "init", str(written), "--add-node", "c") == 1
    assert contents(written) == after


def test_a_certificate_is_renewed_without_touching_the_rest(written: Path) -> None:
    before = contents(written)
    assert fedtune("deploy", "init", str(written), "--renew") == 0
    after = contents(written)
    assert {name for name in after if before[name] != after[name]} == {"server/server.key", "server/server.pem"}
    certificate(written / "server/server.pem").verify_directly_issued_by(certificate(written / "ca/ca.pem"))
    (written / "ca/ca.key").unlink()
    assert fedtune("deploy", "init", str(written), "--renew") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "a"], "needs a server"),
        (["--server", "https://x", "--nodes", "a"], "neither a host name nor an IP address"),
        (["--server", "x", "--nodes", "a,../b"], "cannot be a node's name"),
        (["--server", "x", "--nodes", "a,a"], "two nodes called 'a'"),
        (["--server", "x", "--nodes", "a", "--port", "8000"], "Port 8000 is given for the proxy and for the SuperLink"),
        (["--server", "x", "--nodes", "a", "--model", "/nowhere"], "no model folder"),
        (["--add-node", "a", "--renew"], "go with no other option"),
        (["--add-node", "a"], "no deployment.json"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert fedtune("deploy", "init", str(tmp_path / "d"), *arguments) in (1, 2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_scripts_are_shell_and_can_be_run(written: Path) -> None:
    scripts = sorted(written.rglob("*.sh"))
    assert len(scripts) == 9 + 2 * 4
    for path in scripts:
        subprocess.run(["sh", "-n", path], check=True)
        assert path.name == "environment.sh" or path.stat().st_mode & 0o100


FLWR = """\
#!/bin/sh
echo "$@" >>"$FLWR_HOME/asked"
case "$1" in
    run) echo '{"success": SUCCESS, "run-id": "7"}' ;;
    list) printf '{\\n  "runs": [\\n    {\\n      "run-id": "7",\\n      "status": "STATUS"\\n    }\\n  ]\\n}\\n' ;;
    log) echo "the log" ;;
    supernode) printf 'Registering\\n{\\n  "success": true,\\n  "node-id": "12345678901234567890"\\n}\\n' ;;
esac
"""
"""Answers as Flower's command gives them."""


def pretend_flwr(folder: Path, text: str) -> Path:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/flwr").write_text(text)
    (folder / "bin/flwr").chmod(0o700)
    change(folder / "server/server.env", BIN=str(folder / "bin"))
    return folder / "server"


@pytest.mark.parametrize(
    ("status", "code"), [("finished:completed", 0), ("finished:failed", 1), ("finished:stopped", 1), ("running", 1)]
)
def test_a_run_that_does_not_complete_is_told_as_such(written: Path, status: str, code: int) -> None:
    """`flwr run` and `flwr log` return 0 whatever becomes of the run."""
    server = pretend_flwr(written, FLWR.replace("STATUS", status).replace("SUCCESS", "true"))
    done = subprocess.run([server / "run.sh", "my.toml", "app"], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert f"run 7: {status}" in done.stdout
    asked = (server / "flwr/asked").read_text().splitlines()
    assert asked[0] == "run app deployment --run-config my.toml --format json"


def test_a_run_that_is_refused_is_told_as_such(written: Path) -> None:
    server = pretend_flwr(written, '#!/bin/sh\necho \'{"success": false, "error-message": "no such key"}\'\nexit 1\n')
    done = subprocess.run([server / "run.sh", "my.toml"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no such key" in done.stderr


def test_keys_are_registered_once_and_removed_by_name(written: Path) -> None:
    server = pretend_flwr(written, FLWR)
    for expected in (["registered a as node 12345678901234567890", "registered b as node 12345678901234567890"], []):
        done = subprocess.run([server / "register.sh"], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == expected
    subprocess.run([server / "remove.sh", "a"], check=True, capture_output=True)
    assert "supernode unregister 12345678901234567890 deployment" in (server / "flwr/asked").read_text()
    assert {path.name for path in (server / "nodes").iterdir()} == {"b.pub", "b.id"}
    pretend_flwr(written, "#!/bin/sh\necho 'Public key already in use'\n")
    (server / "nodes/b.id").unlink()
    done = subprocess.run([server / "register.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "b was not registered:\nPublic key already in use" in done.stderr


def test_a_program_that_ends_is_started_again_until_the_supervisor_is_told_to_stop(written: Path, tmp_path: Path) -> None:
    node, seen = written / "nodes/a", tmp_path / "starts"
    change(node / "node.env", RESTART_SECONDS="0.1")
    (node / "supernode.sh").write_text(
        f'#!/bin/sh\necho start >>"{seen}"\n[ "$(wc -l <"{seen}")" -ge 3 ] || exit 7\nexec sleep 60\n'
    )
    process = subprocess.Popen([node / "start.sh"], stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: seen.exists() and len(seen.read_text().splitlines()) == 3, 30)
    assert (node / "start.pid").read_text().strip() == str(process.pid)
    process.terminate()
    _, said = process.communicate(timeout=30)  # what the program left ended, too: it holds the pipe
    assert process.returncode == 0
    assert said.count("supernode.sh ended with exit code 7; next start in 0.1 s") == 2


def test_the_containers_publish_the_proxys_port_only(written: Path) -> None:
    services = yaml.safe_load((written / "server/docker-compose.yml").read_text())["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published == ["8443:8443"]
    assert services["proxy"]["network_mode"] == "service:superlink"
    assert "network_mode" not in services["superlink"]
    assert "--host 127.0.0.1" in (written / "server/superlink.sh").read_text()


def test_the_proxy_listens_to_ipv6_only_where_it_is_asked_to() -> None:
    assert "listen 0.0.0.0:8443 ssl;" in nginx_conf(Plan(("fl.example.org",), ("a",)))
    assert "listen [::]:8443 ssl ipv6only=off;" in nginx_conf(Plan(("2001:db8::5",), ("a",)))
    assert Plan(("2001:db8::5",), ("a",)).server_address == "[2001:db8::5]:8443"


def test_units_are_what_systemd_reads(written: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    units = sorted(written.rglob("*.service"))
    assert len(units) >= 3
    for unit in units:
        text = unit.read_text().replace("/opt/fedtune/server", str(written / "server"))
        copy = tmp_path / unit.name
        copy.write_text(text.replace("/opt/fedtune/node", str(written / "nodes/a")).replace("User=fedtune", "User=root"))
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False)
        assert unit.name not in done.stderr, done.stderr


def test_settings_survive_the_shell_and_editing(tmp_path: Path) -> None:
    path = tmp_path / "node.env"
    value = "/data/two words/$HOME `x` #1.jsonl"
    path.write_text(settings.as_text("A file.", [("DATA", value, "What it is."), ("EMPTY", "", "Nothing.")]))
    assert settings.read(path) == {"DATA": value, "EMPTY": ""}
    done = subprocess.run(["sh", "-c", f'. "{path}"; printf %s "$DATA"'], capture_output=True, text=True, check=True)
    assert done.stdout == value
    path.write_text("\n# a comment\nPORT=80 # why\n")
    assert settings.read(path) == {"PORT": "80"}
    for line in ("DATA = 'x'", "DATA='x", "DATA=two words", "what"):
        path.write_text(line)
        with pytest.raises(DeployError, match=r"Line 1 of .* is not NAME='value'"):
            settings.read(path)
    with pytest.raises(DeployError, match="has a quote"):
        settings.as_text("A file.", [("DATA", 'a"b', "What it is.")])


def test_a_fingerprint_is_of_the_weights_and_not_of_their_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = embedded_path("model")
    expected = weights_fingerprint(source)
    tensors = load_file(source / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:3]}, tmp_path / "model-1.safetensors", metadata={"x": "y"})
    save_file({name: tensors[name] for name in names[3:]}, tmp_path / "model-2.safetensors")
    assert weights_fingerprint(tmp_path) == expected
    tensors[names[-1]].view(-1)[-1] += 1e-3
    save_file({name: tensors[name] for name in names[3:]}, tmp_path / "model-2.safetensors")
    assert weights_fingerprint(tmp_path) != expected
    whole = (tmp_path / "model-2.safetensors").read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", b"\xff" * 16, b"\x02" + bytes(7) + b"[]"):
        (tmp_path / "model-2.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match="not a complete safetensors file"):
            weights_fingerprint(tmp_path)
