"""A real deployment on this machine for one run: a SuperLink, and a SuperNode a client, each behind a proxy that counts.

Every program is Flower's own and the app is this checkout, submitted as `flwr run` submits it. The nodes share one worker,
which keeps the model loaded. `close` ends everything and leaves nothing.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import fedtune
from fedtune.config import RunConfig
from fedtune.errors import EngineError
from fedtune.progress import check_stop
from simulations.engines.flower_app import config_lines
from simulations.engines.superlink import SuperLink, free_port
from simulations.proxy import CountingProxy

ONLINE_SECONDS = 180.0  # until every SuperNode is connected
POLL_SECONDS = 0.5


class Deployed:
    """SuperLink, proxies and SuperNodes. Start with the constructor, always end with `close`.

    Attributes:
        proxies: by client id, what passed between its SuperNode and the SuperLink.
    """

    def __init__(self, clients: int, *, tls: bool = False) -> None:
        """Start it and wait until every node is connected. Raises EngineError if one ended, or was not there in time."""
        self.app = checkout()
        self.proxies: dict[str, CountingProxy] = {}
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._link = SuperLink(simulation=False, tls=tls)
        try:
            for number in range(clients):
                self._start_node(number, clients)
            self._wait(lambda: self._link.online() == clients, ONLINE_SECONDS)
        except BaseException:
            self.close()
            raise

    def _start_node(self, number: int, clients: int) -> None:
        name, folder = str(number), self._link.home / f"node-{number}"
        folder.mkdir()
        proxy = self.proxies[name] = CountingProxy(self._link.port)
        trust = ["--root-certificates", str(self._link.ca)] if self._link.ca else ["--insecure"]
        node = f'partition-id={number} num-partitions={clients} worker="auto" server-decides=true'  # one person's machine
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{proxy.port}", *trust, "--host", "127.0.0.1"]
        command += ["--port", str(free_port()), "--node-config", node]
        own = {"FLWR_HOME": str(folder / "flwr"), "FEDTUNE_WORKERS": str(self._link.home / "workers")}
        self._nodes[name] = self._link.launch(command, folder, own)

    def submit(self, config: RunConfig) -> str:
        """Start a run of this checkout with the settings `config`, as an operator would; returns its id."""
        preset = self._link.home / "preset.toml"
        preset.write_text("\n".join(config_lines(config)) + "\n", encoding="utf-8")
        return self._link.submit(self.app, {}, preset)

    def follow(self, run: str, between: Callable[[], None]) -> None:
        """Wait for the end of `run`, calling `between` a few times a second.

        Raises:
            EngineError: it did not complete, or a process ended.
            Interrupted: a stop was requested.
        """
        with self._link.log(run) as log:
            said: list[str] = []
            while not log.ended:
                check_stop()
                self._check()
                between()
                said = [*said, *log.read()][-20:]
                time.sleep(POLL_SECONDS)
            said += log.read()
        between()
        status, details = self._link.status(run)
        if status != "finished:completed":
            raise EngineError(f"Flower ended the run as '{status}': {details or 'no reason given'}", tail=tuple(said[-20:]))

    def _check(self) -> None:
        """Raise EngineError if a process ended that should not."""
        self._link.check()
        for name, process in self._nodes.items():
            if process.poll() is not None:
                lines = (self._link.home / f"node-{name}" / "output.log").read_text(errors="replace").splitlines()
                raise EngineError(
                    f"The SuperNode of client {name} ended with exit code {process.returncode}.", tail=lines[-20:]
                )

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            check_stop()
            self._check()
            if time.monotonic() > deadline:
                raise EngineError(f"Not every SuperNode was connected within {seconds:g} s.", tail=self._link.tail())
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """End every process and every proxy, and remove their folder."""
        for process in self._nodes.values():
            process.terminate()
        self._link.close()
        for process in self._nodes.values():
            process.wait()
        for proxy in self.proxies.values():
            proxy.close()


def checkout() -> Path:
    """The folder of this checkout, which is the app. Raises EngineError where fedtune is installed without it."""
    folder = Path(fedtune.__file__).parents[1]
    if not (folder / "pyproject.toml").is_file():
        raise EngineError("A deployment submits fedtune's checkout, and this is an installed package: clone the repository.")
    return folder
