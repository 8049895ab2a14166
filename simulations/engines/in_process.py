"""Run a whole federation in this process: fedtune's ServerApp and ClientApp on a LocalGrid."""

from __future__ import annotations

from fedtune.config import RunConfig
from fedtune.progress import Event, RunFinished, listening
from simulations.engines.local_grid import Faults, LocalGrid

__all__ = ["Faults", "LocalGrid", "run_in_process"]


def run_in_process(config: RunConfig) -> dict[str, object]:
    """Run `config` to its end and return the summary (summary.json of its run folder).

    Raises:
        FedtuneError: what the server raises, unchanged. `Interrupted` if a stop was requested.
    """
    import client.app
    import server.app

    summaries: list[dict[str, object]] = []

    def note_summary(event: Event) -> None:
        if isinstance(event, RunFinished):
            summaries.append(event.summary)

    grid = LocalGrid(client.app.app, config.clients, config.as_mapping(), seed=config.seed)
    with listening(note_summary):
        server.app.app(grid, grid.server_context())
    return summaries[-1]
