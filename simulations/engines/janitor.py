"""`python -m simulations.engines.janitor HOME`: ends what works in HOME, and removes it, as soon as stdin ends.

A process that starts a SuperLink holds the other end of that pipe, so however it ends, kill -9 included, nothing of the run
goes on without it: a resume finds the ledger free.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from simulations.engines.processes import end_all


def main() -> None:
    """Wait, then clean up; again if something was left."""
    home = Path(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")  # what works in HOME is ended, and this is not a part of it
    os.environ.pop("FLWR_HOME", None)
    while sys.stdin.buffer.read(1):
        pass
    if home.exists():
        for _ in range(3):
            if end_all(home, None):
                break
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
