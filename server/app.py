"""The Flower ServerApp: it reads the run config, opens the run folder and hands over to the round loop.

Flower reports a failed ServerApp only in its logs, so a failure is also written to error.json in the run folder. Where
nobody in the process listens (a deployment, `flwr run`), the run is told line by line in Flower's log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune import progress
from fedtune.cli.lines import LineLog
from fedtune.cli.view import RunView
from fedtune.config import RunConfig
from fedtune.resident import resident
from fedtune.run_folder import RunFolder, check_new, dated
from server.rounds import Run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation to its end."""
    asked = RunConfig.from_mapping(dict(context.run_config))
    out = asked.out or dated(asked.algorithm)
    config = asked.replace(out=str(Path(out).resolve()))
    check_new(config.out)
    resident(config).load()  # a run that cannot start leaves no folder behind
    folder = RunFolder.create(config.out, asked.as_mapping(), config)
    try:
        with _told():
            Run(grid, config, folder).execute()
    except Exception as error:
        folder.write_json("error.json", {"type": type(error).__name__, "message": str(error)})
        raise


@contextmanager
def _told() -> Iterator[None]:
    """Tell the run in Flower's log, unless somebody listens already."""
    with ExitStack() as stack:
        if not progress.heard():
            view = RunView()
            stack.enter_context(progress.listening(view))
            stack.enter_context(progress.listening(LineLog(view, logging.getLogger("flwr").info)))
        yield
