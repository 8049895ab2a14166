"""fedtune's ServerApp for the Flower engine: the same app, with its events and its error relayed."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.app import app as server_app
from simulations.engines.relay import relaying

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run `server.app`."""
    with relaying(with_error=True):
        server_app(grid, context)
