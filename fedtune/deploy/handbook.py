"""README.md of a deployment's folder: what each folder is for and the next steps, with this deployment's names filled in."""

from __future__ import annotations

from fedtune.deploy.certificates import AUTHORITY_DAYS, SERVER_DAYS
from fedtune.deploy.plan import Plan


def readme(plan: Plan) -> str:
    """The text."""
    names = ", ".join(plan.nodes) or "none yet"
    example = plan.nodes[0] if plan.nodes else "NAME"
    return f"""\
# A fedtune deployment

Server: {plan.server_address}. Nodes: {names}.

| folder | goes to | holds |
|---|---|---|
| `server/` | the server's machine | the SuperLink's and the proxy's certificates and keys, the nodes' public keys, scripts |
| `nodes/NAME/` | the machine of that node, and nowhere else | its private key, the CA's certificate, its settings, scripts |
| `ca/` | a place that is neither | `ca.key`, which can sign certificates; needed again for `--renew` only |

The CA is valid for {AUTHORITY_DAYS} days, `server/server.pem` for {SERVER_DAYS} days: renew it in time with
`fedtune deploy init . --renew`, copy `server.pem` and `server.key` to the server, and run `./proxy.sh -s reload` there.

## Next steps

1. Server: copy `server/` there, install fedtune and nginx, open port {plan.public_port} and no other.

       ./start.sh                 # keep it running: see docs/deployment.md for systemd
       ./register.sh              # once it runs, in a second terminal: the nodes' keys
       fedtune deploy check .

2. Every node: copy its folder there, install fedtune, fill in MODEL and DATA in `node.env`.

       fedtune deploy check .     # what is wrong, with the fix
       ./start.sh

3. Server, from a clone of fedtune: the run.

       {{SERVER-FOLDER}}/run.sh my-preset.toml

More nodes later: `fedtune deploy init . --add-node NAME`, copy `server/nodes/NAME.pub` to the server's `nodes/`, run
`./register.sh` there, and give `nodes/NAME/` to its machine. One node less: `./remove.sh {example}` on the server.
"""
