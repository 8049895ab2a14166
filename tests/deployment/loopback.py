"""A deployment on this machine: every machine is a folder that `fedtune deploy init` wrote, started by its own scripts."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from fedtune.cli import main
from fedtune.deploy.check.network import Place
from simulations.engines.processes import end_all, living

ROOT = Path(__file__).parents[2]
START_SECONDS = 180.0  # until a process answers on a busy machine; 5 to 10 on an idle one
RUN_SECONDS = 1800.0
STOP_SECONDS = 90.0
RESTART_SECONDS = "3"  # a deployment has 15: what is tested is that programs are started again, not how long that takes


class Loopback:
    """A server and its nodes below `folder`. Whoever makes one calls `close`, which fails if a process is left."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder, self.server = folder, folder / "server"
        public, superlink, *runtime = free_ports(2 + len(nodes))
        self.public, self.superlink = public, superlink
        self._running: dict[Path, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        fedtune(
            "deploy", "init", str(folder), "--server", "127.0.0.1", "--server", "fl.example.org", "--nodes", ",".join(nodes),
            "--port", str(public), "--superlink-port", str(superlink), "--model", "embedded",
        )  # fmt: skip
        change(self.server / "server.env", BIN=programs(), RESTART_SECONDS=RESTART_SECONDS)
        for name, port in zip(nodes, runtime, strict=True):
            change(
                self.node(name) / "node.env",
                BIN=programs(),
                RUNTIME_PORT=str(port),
                DEVICE="cpu",
                RESTART_SECONDS=RESTART_SECONDS,
            )

    def node(self, name: str) -> Path:
        return self.folder / "nodes" / name

    @property
    def place(self) -> Place:
        """The public port, as a node sees it."""
        return Place("127.0.0.1", self.public, "127.0.0.1", self.server / "ca.pem")

    def start(self, machine: Path) -> None:
        """Run start.sh of a machine's folder; what it prints is in output.log there."""
        log = (machine / "output.log").open("ab")
        process = subprocess.Popen(
            [machine / "start.sh"],
            cwd=machine,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._running[machine] = (process, log)

    def call(self, script: str, *arguments: str, seconds: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run one of the server's scripts to its end."""
        return subprocess.run(
            [self.server / script, *arguments],
            cwd=self.server,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def run(self, preset: Path) -> subprocess.CompletedProcess[str]:
        """Run a preset of this checkout on the deployment, to its end."""
        return self.call("run.sh", str(preset), str(ROOT), seconds=RUN_SECONDS)

    def says(self, machine: Path) -> str:
        """What the machine's start.sh printed so far."""
        path = machine / "output.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def stop(self, machine: Path) -> None:
        """Stop one machine as an operator would; one that was not started is none to stop."""
        if machine in self._running:
            process, log = self._running.pop(machine)
            process.terminate()
            assert wait_until(lambda: process.poll() is not None and not living(machine), STOP_SECONDS)
            log.close()

    def close(self) -> None:
        """Stop everything as an operator would, and make sure that it worked."""
        for process, _ in self._running.values():
            process.send_signal(signal.SIGTERM)
        gone = wait_until(lambda: not self._left(), STOP_SECONDS)
        left = [] if gone else [Path(f"/proc/{number}/cmdline").read_bytes() for number in self._left()]
        for process, log in self._running.values():
            end_all(self.folder, process)
            log.close()
        assert gone, f"left after TERM: {left}"

    def _left(self) -> list[int]:
        for process, _ in self._running.values():
            process.poll()  # a child that ended is gone only when it was asked for
        return living(self.folder)


def fedtune(*arguments: str) -> int:
    """The command line in this process; its exit code."""
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def alone(machine: Path, script: str, seconds: float = START_SECONDS) -> tuple[int, str]:
    """Exit code and output of a script that is expected to end by itself, without a supervisor.

    The output goes to a file: its SuperExec holds it open until the SuperNode's process is gone, and it is gone when it
    has been waited for.
    """
    path = machine / "alone.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [machine / script], cwd=machine, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
            process.wait()
    return code, path.read_text(errors="replace")


def change(path: Path, **values: str) -> None:
    """Edit an .env file as a person would."""
    text = path.read_text()
    for name, value in values.items():
        text, count = re.subn(rf"^{name}=.*$", f"{name}='{value}'", text, flags=re.MULTILINE)
        assert count == 1, f"{path} has {count} lines for {name}"
    path.write_text(text)


def programs() -> str:
    """Where the programs of this environment are."""
    return str(Path(sys.executable).parent)


def environment() -> dict[str, str]:
    """This process's environment; fedtune is this checkout wherever a program starts."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def free_ports(count: int) -> list[int]:
    """Different free ports of loopback."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def wait_until(condition: Callable[[], object], seconds: float = START_SECONDS) -> bool:
    """Whether `condition` came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
