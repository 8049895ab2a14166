"""The same programs under systemd and under Docker Compose."""

from __future__ import annotations

from fedtune.deploy.plan import Plan
from fedtune.deploy.scripts import RESTART_SECONDS

HOME = "/opt/fedtune"
"""Where the units expect a machine's folder: /opt/fedtune/server or /opt/fedtune/node."""


def superlink_unit() -> str:
    """fedtune-superlink.service."""
    return _unit("fedtune: Flower SuperLink (loopback)", f"{HOME}/server", "superlink.sh")


def proxy_unit() -> str:
    """fedtune-proxy.service; ports below 1024 are allowed."""
    return _unit(
        "fedtune: proxy before the SuperLink", f"{HOME}/server", "proxy.sh", "AmbientCapabilities=CAP_NET_BIND_SERVICE\n"
    )


def supernode_unit(name: str) -> str:
    """fedtune-supernode.service."""
    return _unit(f"fedtune: Flower SuperNode {name}", f"{HOME}/node", "supernode.sh")


def _unit(description: str, folder: str, program: str, more: str = "") -> str:
    return f"""\
# For a user fedtune that owns {folder}, with BIN set in the .env file there; docs/deployment.md has the commands.
[Unit]
Description={description}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User=fedtune
WorkingDirectory={folder}
ExecStart={folder}/{program}
Restart=always
RestartSec={RESTART_SECONDS}
TimeoutStopSec=30
NoNewPrivileges=yes
ProtectSystem=full
UMask=0077
{more}
[Install]
WantedBy=multi-user.target
"""


def compose(plan: Plan) -> str:
    """docker-compose.yml of the server: the proxy shares the SuperLink's network, and only the proxy's port is published."""
    port = plan.public_port
    return f"""\
# The server in containers: FEDTUNE_SOURCE=/path/to/clone docker compose up -d
# The proxy lives in the SuperLink's network namespace, so the SuperLink stays on loopback here too: it is neither published
# nor reachable from other containers. Operator's commands: docker compose exec superlink ./register.sh
services:
  superlink:
    build:
      context: ${{FEDTUNE_SOURCE:?set it to a clone of fedtune}}
      dockerfile_inline: |
        FROM python:3.12-slim
        COPY . /fedtune
        RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu /fedtune
    working_dir: /deployment
    command: ["./superlink.sh"]
    volumes: ["./:/deployment"]
    ports: ["{port}:{port}"]
    restart: always
  proxy:
    image: nginx:1.28
    command: ["/deployment/proxy.sh"]
    entrypoint: []
    volumes: ["./:/deployment"]
    network_mode: "service:superlink"
    depends_on: [superlink]
    restart: always
"""
