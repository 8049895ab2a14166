"""Which checks belong to the server's folder, which to a node's, and which folder is which."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fedtune.deploy import settings
from fedtune.deploy.check import files, machine, network
from fedtune.deploy.check.findings import Finding, State, good, warn, wrong
from fedtune.deploy.plan import NODES, PLAN, SERVER
from fedtune.deploy.server import PROTECTION
from fedtune.errors import DeployError

_SCRIPT = "The .env file was edited: correct the line, or take it from a new `fedtune deploy init` elsewhere."


def check_deployment(folder: Path, role: str = "") -> list[Finding]:
    """Check what is in `folder`.

    Args:
        folder: a machine's folder (server/ or nodes/NAME/), or the whole deployment.
        role: 'server' or the name of a node; only for the whole deployment, where empty means all of them.

    Raises:
        DeployError: it is none of these, or has no such role, or an .env file cannot be read.
    """
    places = _places(folder.absolute(), role)  # programs are started from other folders
    return [replace(finding, role=name) for name, place in places.items() for finding in _check(place)]


def _places(folder: Path, role: str) -> dict[str, Path]:
    """Role -> folder."""
    if (folder / settings.SERVER_ENV).is_file():
        found = {"server": folder}
    elif (folder / settings.NODE_ENV).is_file():
        found = {settings.read(folder / settings.NODE_ENV).get("CLIENT_ID", folder.name): folder}
    elif (folder / PLAN).is_file():
        nodes = sorted(path for path in (folder / NODES).glob("*") if path.is_dir())  # some may be on their machines by now
        found = {"server": folder / SERVER} | {path.name: path for path in nodes}
    else:
        raise DeployError(
            f"'{folder}' is no folder of a deployment ({settings.SERVER_ENV}, {settings.NODE_ENV} or {PLAN} was expected): "
            "give server/, nodes/NAME/ or the folder that `fedtune deploy init` wrote."
        )
    if role and role not in found:
        raise DeployError(f"'{folder}' has no role '{role}': it has {', '.join(found)}.")
    return {role: found[role]} if role else found


def _check(folder: Path) -> Iterator[Finding]:
    if (folder / settings.SERVER_ENV).is_file():
        yield from check_server(folder)
    else:
        yield from check_node(folder)


def check_server(folder: Path) -> Iterator[Finding]:
    """Everything about the server's machine."""
    values = settings.read(folder / settings.SERVER_ENV)
    hosts = values.get("HOSTS", "").split()
    yield from machine.packages()
    yield from machine.programs(values, ["flower-superlink", "flwr", "nginx"])
    yield machine.disk(folder)
    yield from files.keys(folder, ["server.key", "superlink.key"])
    yield from files.authority(folder / "ca.pem")
    yield from files.server_certificate(folder, hosts)
    yield files.model(values, required=False)
    yield from _proxy_configuration(folder, values)
    try:
        public, superlink = int(values.get("PUBLIC_PORT", "")), int(values.get("SUPERLINK_PORT", ""))
    except ValueError:
        yield wrong("ports", "PUBLIC_PORT and SUPERLINK_PORT have to be numbers.", _SCRIPT)
        return
    yield from _ports(folder, hosts, public, superlink)


def _ports(folder: Path, hosts: list[str], public: int, superlink: int) -> Iterator[Finding]:
    finding, runs = network.own_port("SuperLink", "the SuperLink", superlink)
    yield finding
    if runs:
        yield from network.beyond_loopback(hosts, superlink)
    finding, runs = network.own_port("proxy", "the proxy", public)
    yield finding
    if runs:
        place = network.Place("127.0.0.1", public, hosts[0] if hosts else "localhost", folder / "ca.pem")
        yield from network.server_from_here(place)


def _proxy_configuration(folder: Path, values: Mapping[str, str]) -> Iterator[Finding]:
    """nginx.conf: the same ports as server.env, and nginx takes it."""
    try:
        text = (folder / "nginx.conf").read_text(encoding="utf-8")
    except OSError as error:
        yield wrong("proxy", f"nginx.conf cannot be read: {error.strerror}.", "Copy the folder again.")
        return
    for key, pattern in (("PUBLIC_PORT", r"listen \S+:(\d+) ssl"), ("SUPERLINK_PORT", r"server 127\.0\.0\.1:(\d+);")):
        found = re.findall(pattern, text)
        if found != [values.get(key, "")]:
            yield wrong(
                "proxy",
                f"nginx.conf has {', '.join(found) or 'no port'} where server.env has {key} = {values.get(key)}.",
                "Make both the same.",
            )
    missing = [name for name in PROTECTION if not re.search(rf"^\s*{name}\s", text, re.MULTILINE)]
    if missing:
        yield warn(
            "proxy",
            f"nginx.conf has no {', '.join(missing)}: connections that say nothing can keep nodes out.",
            "Take nginx.conf from a new `fedtune deploy init` elsewhere with the same ports, then `./proxy.sh -s reload`.",
        )
    try:
        done = subprocess.run([folder / "proxy.sh", "-t"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield wrong("proxy", f"proxy.sh cannot be run ({error}).", "Copy the folder again, and install nginx.")
        return
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "emerg" in line), done.stderr.strip())
        yield wrong("proxy", f"nginx refuses nginx.conf: {said}", "Correct that line, or install nginx if it is missing.")
    else:
        yield good("proxy", "nginx takes nginx.conf.")


def check_node(folder: Path) -> Iterator[Finding]:
    """Everything about a node's machine."""
    values = settings.read(folder / settings.NODE_ENV)
    yield from machine.packages()
    yield from machine.programs(values, ["python3", "flower-superexec", "flwr-clientapp"])
    yield machine.supernode(values)
    yield machine.disk(folder)
    yield machine.device(values.get("DEVICE", ""))
    yield from files.keys(folder, ["node.key"])
    yield from files.node_key(folder / "node.key")
    yield from files.authority(folder / "ca.pem")
    yield from _spelling(values)
    yield files.model(values, required=True)
    yield files.data(values.get("DATA", ""))
    yield _runtime_port(values.get("RUNTIME_PORT", ""))
    try:
        host, port = network.parse_address(values.get("SERVER", ""))
    except ValueError as error:
        yield wrong("server", f"SERVER: {error}.", "Set SERVER in node.env to host:port of the server's proxy.")
        return
    yield from network.server_from_here(network.Place(host, port, host, folder / "ca.pem"))


def _spelling(values: Mapping[str, str]) -> Iterator[Finding]:
    """Values that Flower's --node-config cannot carry."""
    for name in ("CLIENT_ID", "MODEL", "DATA", "DEVICE", "WORKER"):
        value = values.get(name, "")
        if any(mark in value for mark in "\"'\\"):
            yield wrong(
                "settings", f"{name} = {value} has a quote or a backslash.", "Rename the file: Flower cannot pass such a value."
            )


def _runtime_port(text: str) -> Finding:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        return wrong("runtime port", f"RUNTIME_PORT = '{text}' is not a port.", _SCRIPT)
    if network.port_free("127.0.0.1", int(text)) is None:
        return good("runtime port", f"{text} is free; the SuperNode does not run yet.")
    if number := machine.supernode_at(int(text)):
        return good("runtime port", f"{text} is used by the SuperNode, process {number}.")
    return Finding(
        "runtime port",
        State.warning,
        f"Port {text} is in use by a program that is not seen to be this node's SuperNode.",
        "If the SuperNode cannot start, give it another RUNTIME_PORT in node.env.",
    )
