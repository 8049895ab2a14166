"""The Flower ServerApp: it reads the run config, opens the run folder and hands over to the round loop.

Flower reports a failed ServerApp only in its logs, so a failure is also written to error.json in the run folder, where
`fedtune simulate --engine flower` finds it.
"""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.config import RunConfig
from fedtune.run_folder import RunFolder
from server.rounds import Run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation to its end."""
    asked = RunConfig.from_mapping(dict(context.run_config))
    out = asked.out or f"runs/{asked.algorithm}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = asked.replace(out=str(Path(out).resolve()))
    folder = RunFolder.create(config.out, asked.as_mapping(), config)
    try:
        Run(grid, config, folder).execute()
    except Exception as error:
        folder.write_json("error.json", {"type": type(error).__name__, "message": str(error)})
        raise
