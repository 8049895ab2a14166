"""The Flower ServerApp: it reads the run config, opens the run folder and hands over to the round loop.

Flower reports a failed ServerApp only in its logs, so a failure is also written to error.json in the run folder. Where
nobody in the process listens (a deployment, `flwr run`), the run is told line by line in Flower's log.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune import progress
from fedtune.cli.lines import LineLog
from fedtune.cli.view import RunView
from fedtune.config import RunConfig
from fedtune.control import Doing
from fedtune.errors import FedtuneError, Interrupted
from fedtune.foreign import for_file
from server.log import logging_to
from server.opening import open_run
from server.rounds import Run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation to its end, from the beginning or from where it was (run config key `resume`)."""
    opened = open_run(RunConfig.from_mapping(dict(context.run_config)))
    with opened.ledger, _told(), logging_to(opened.folder.path):
        run = Run(grid, opened)
        try:
            run.execute()
        except Exception as error:
            _write_error(run, error)
            raise


def _write_error(run: Run, error: Exception) -> None:
    """Write error.json and the status; a disk that is full, say, does not hide the error itself."""
    text = for_file(str(error))
    with contextlib.suppress(FedtuneError):
        run.folder.write_json("error.json", {"type": type(error).__name__, "message": text})
        run.operator.say(Doing.STOPPED if isinstance(error, Interrupted) else Doing.FAILED, text)


@contextmanager
def _told() -> Iterator[None]:
    """Tell the run in Flower's log, unless somebody listens already."""
    with ExitStack() as stack:
        if not progress.heard():
            view = RunView()
            stack.enter_context(progress.listening(view))
            stack.enter_context(progress.listening(LineLog(view, logging.getLogger("flwr").info)))
        yield
