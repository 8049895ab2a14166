"""What a deployment is: the names of its server, its nodes, its ports; kept in deployment.json for later commands."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from fedtune.errors import DeployError

PLAN = "deployment.json"
SERVER, NODES, AUTHORITY = "server", "nodes", "ca"
"""The folders of a deployment: for the server's machine, for the nodes' machines, and to be kept off both."""

FIRST_RUNTIME_PORT = 9094  # Flower's own default, on loopback

_NODE = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")


@dataclass(frozen=True)
class Plan:
    """A deployment.

    Attributes:
        hosts: names and addresses of the server as nodes know it; they connect to the first.
        nodes: names of the nodes, which are the clients' ids.
        public_port: where the reverse proxy listens.
        superlink_port: where the SuperLink listens, on loopback only.
        model: the server's model folder, "" if it is not known yet.
        weights: fingerprint of that folder's weights, "" if unknown.
    """

    hosts: tuple[str, ...]
    nodes: tuple[str, ...]
    public_port: int = 8443
    superlink_port: int = 8000
    model: str = ""
    weights: str = ""

    def __post_init__(self) -> None:
        if not self.hosts:
            raise DeployError("A deployment needs a server: give --server with the host name that nodes will connect to.")
        for host in self.hosts:
            if as_address(host) is None and not _HOST.fullmatch(host):
                raise DeployError(f"'{host}' is neither a host name nor an IP address: give --server without scheme or port.")
        check_names(self.nodes)
        if self.public_port == self.superlink_port:
            raise DeployError(
                f"Port {self.public_port} is given for the proxy and for the SuperLink: each needs one of its own."
            )

    @property
    def server_address(self) -> str:
        """host:port that nodes connect to."""
        host = self.hosts[0]
        return f"[{host}]:{self.public_port}" if ":" in host else f"{host}:{self.public_port}"

    def runtime_port(self, node: str) -> int:
        """A loopback port of the node, different for each, so that several can share a machine."""
        return FIRST_RUNTIME_PORT + self.nodes.index(node)

    def with_node(self, name: str) -> Self:
        """The plan with one more node. Raises DeployError if the name is taken or cannot be used."""
        return replace(self, nodes=(*self.nodes, name))

    def as_text(self) -> str:
        """The plan as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The plan of the deployment in `folder`. Raises DeployError if there is none."""
        path = folder / PLAN
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**found, "hosts": tuple(found["hosts"]), "nodes": tuple(found["nodes"])})
        except FileNotFoundError:
            raise DeployError(f"'{folder}' has no {PLAN}: give the folder that `fedtune deploy init` wrote.") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DeployError(f"'{path}' cannot be used ({error}): restore it from a copy.") from None


def as_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """`host` as an IP address, None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def check_names(nodes: Sequence[str]) -> None:
    """Raise DeployError unless every name can be a folder, a client id and a host-like label, and none comes twice."""
    for number, name in enumerate(nodes):
        if not _NODE.fullmatch(name):
            raise DeployError(f"'{name}' cannot be a node's name: use up to 63 lower-case letters, digits, '-', '_' and '.'.")
        if name in nodes[:number]:
            raise DeployError(f"There are two nodes called '{name}': give each a name of its own.")
