"""A whole federation whose nodes forward to a worker, and which may lose what Flower keeps for them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import Context, Message, RecordDict

import client.app
import server.app
from fedtune.config import RunConfig
from fedtune.progress import Event, RunFinished, listening
from simulations.engines.local_grid import LocalGrid


@dataclass
class Outcome:
    """The digest at the end, and the problems that clients answered with."""

    digest: str = ""
    problems: list[str] = field(default_factory=list)


def rounds(
    config: RunConfig, *, forget_state: bool, worker: str, before: Callable[[Message], None] = lambda message: None
) -> Outcome:
    """Run `config`; with `forget_state` the nodes' contexts are empty at every message, as after a restart."""
    outcome = Outcome()

    def handler(message: Message, context: Context) -> Message:
        before(message)
        if forget_state:
            context.state = RecordDict()
        reply = client.app.app(message, context)
        if problem := reply.content.config_records["fedtune"].get("problem"):
            outcome.problems.append(str(problem))
        return reply

    def note(event: Event) -> None:
        if isinstance(event, RunFinished):
            outcome.digest = str(event.summary["digest"])

    with tempfile.TemporaryDirectory() as folder, listening(note):
        config = config.replace(out=f"{folder}/run", clients_per_round=config.clients)
        nodes = {node: {"worker": worker} for node in range(config.clients)}
        grid = LocalGrid(handler, config.clients, config.as_mapping(), node_configs=nodes)
        server.app.app(grid, grid.server_context())
    return outcome
