"""What the tests of deployments share: a written deployment, and one that runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from federations import NODES, TINY, Federation, answers, give_files
from loopback import Loopback, wait_until

from fedtune.cli import main
from fedtune.config import RunConfig
from simulations.engines.in_process import run_in_process


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A deployment as init writes it, for the server localhost and the nodes a and b."""
    folder = tmp_path / "federation"
    with pytest.raises(SystemExit, match="0"):
        main(["deploy", "init", str(folder), "--server", "localhost", "--nodes", "a,b"])
    return folder


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One deployment for all tests: server, proxy, two nodes with files of their own, TLS and authentication."""
    if shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("no nginx: apt install nginx-light")
    folder = tmp_path_factory.mktemp("deployed")
    simulated = run_in_process(RunConfig.from_mapping({**TINY, "out": str(folder / "simulated")}))
    loopback = Loopback(folder / "federation", NODES)
    try:
        give_files(loopback, folder)
        loopback.start(loopback.server)
        assert wait_until(lambda: answers(loopback.place)), loopback.says(loopback.server)
        registered = loopback.call("register.sh")
        assert registered.returncode == 0, registered.stderr
        for name in NODES:
            loopback.start(loopback.node(name))
        yield Federation(loopback, simulated, folder)
    finally:
        loopback.close()
