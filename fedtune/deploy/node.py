"""The files of a node's folder, except its key: who it is, how its SuperNode is started, and again when it ends."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.deploy import scripts, services, settings
from fedtune.deploy.plan import Plan
from fedtune.deploy.scripts import script

_SUPERNODE = script(
    "The SuperNode: it asks the server for work; nothing from the network reaches it. The key says who it is. "
    "client.supernode is Flower's own with shorter waits (docs/worker.md).",
    """\
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.25  # seconds until a message that came is worked on; Flower's own is 1
cd "$here/work"
exec python3 -P -m client.supernode --superlink "$SERVER" --root-certificates "$here/ca.pem" \\
    --auth-supernode-private-key "$here/node.key" --host 127.0.0.1 --port "$RUNTIME_PORT" \\
    --node-config \\
    "client-id=\\"$CLIENT_ID\\" model=\\"$MODEL\\" data=\\"$DATA\\" device=\\"$DEVICE\\" worker=\\"${WORKER:-auto}\\" ${MORE:-}"
""",
)

_START = script(
    "The SuperNode in the foreground, started again when it ends; Ctrl-C or TERM stops it.",
    """\
echo $$ >"$here/start.pid"
exec "$here/supervise.sh" "$here/supernode.sh"
""",
)

_WORKERS = """\
export FEDTUNE_WORKERS="$here/workers"  # where this node's worker is found; supervise.sh ends it
"""


def scripts_of_node() -> Mapping[str, str]:
    """Name -> text of the executable files."""
    return {"supervise.sh": scripts.SUPERVISE, "supernode.sh": _SUPERNODE, "start.sh": _START}


def texts_of_node(plan: Plan, name: str) -> Mapping[str, str]:
    """Name -> text of the other files."""
    return {
        settings.NODE_ENV: node_env(plan, name),
        "environment.sh": scripts.environment(settings.NODE_ENV) + _WORKERS,
        "fedtune-supernode.service": services.supernode_unit(name),
    }


def node_env(plan: Plan, name: str) -> str:
    """node.env, in which MODEL and DATA are to be filled in on the node."""
    return settings.as_text(
        f"Node {name} of a fedtune deployment.",
        [
            ("MODEL", "", "TO FILL IN: absolute path of the base model's folder on this machine."),
            ("DATA", "", "TO FILL IN: absolute path of this node's own .jsonl, .json or .parquet file. It stays here."),
            ("DEVICE", "auto", "auto, cpu, cuda, cuda:N or mps."),
            ("WORKER", "auto", "auto: a process keeps the model loaded between messages; off: each message loads it."),
            ("MORE", "", "Further node config, such as: offload=true threads=8 trust-remote-code=true (docs/deployment.md)."),
            ("BIN", "", "Folder of fedtune's and Flower's programs (a virtual environment's bin); empty: those on the PATH."),
            ("CLIENT_ID", name, "The client's name in the server's records; keep it across restarts."),
            ("SERVER", plan.server_address, "host:port of the server's proxy."),
            ("RUNTIME_PORT", str(plan.runtime_port(name)), "A free port on loopback, for the node's own processes."),
            ("MODEL_FINGERPRINT", plan.weights, "Of the server's weights; empty: not compared before the run."),
            ("RESTART_SECONDS", str(scripts.RESTART_SECONDS), "Between the end of the SuperNode and its next start."),
        ],
    )
