"""A private SuperLink on this machine, with everything it starts and leaves behind under control.

`flwr run` alone starts a shared SuperLink that stays, installs dependencies from the network, and reports success for
failed runs. Here the SuperLink has a port, a home folder and an environment of its own, and `close` ends every process
that came from it, Ray's included, and removes the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fedtune
from fedtune.deploy.certificates import LOOPBACK, Authority
from fedtune.errors import EngineError
from simulations.engines.processes import end_all, undisturbed
from simulations.engines.relay import VARIABLE

START_SECONDS = 60.0  # until the SuperLink answers; a few seconds on an idle machine
COMMAND_SECONDS = 120.0  # for one `flwr` command
_LONGEST_TEMPORARY = 24  # characters; Ray's sockets lie 65 deeper and a socket's path has at most 103
_CONNECTION = "private"

# Telemetry, update check and `uv sync` of the app's dependencies reach for the network; see Flower's environment switches.
_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do anyway, without a warning in every log
    "PYTHONUNBUFFERED": "1",
}


class SuperLink:
    """Start with the constructor, always end with `close`.

    Attributes:
        home: FLWR_HOME and working directory of all its processes; removed by `close`.
        relay: path of the file in which the run's processes say what they do.
        port: of loopback, where it listens.
        ca: certificate of its CA; None without TLS.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, *, simulation: bool = True, tls: bool = False) -> None:
        """Start it and wait until it answers.

        Args:
            environment: further variables for its processes.
            simulation: it runs clients itself (Ray); False: SuperNodes connect to it.
            tls: with a certificate of a CA of its own.

        Raises:
            EngineError: it ended, or did not answer in time.
        """
        self.home = Path(tempfile.mkdtemp(prefix="fedtune-", dir=_short_temporary()))
        self.relay = self.home / "relay.jsonl"
        self.ca = self.home / "ca.pem" if tls else None
        self._process: subprocess.Popen[bytes] | None = None
        self._janitor = _janitor(self.home)
        try:
            self._start(environment or {}, ["--simulation"] if simulation else [])
        except BaseException:
            self.close()
            raise

    def _start(self, environment: Mapping[str, str], kind: list[str]) -> None:
        self.port = free_port()
        trust = f'root-certificates = "{self.ca}"' if self.ca else "insecure = true"
        connection = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        (self.home / "config.toml").write_text(f'{connection}address = "127.0.0.1:{self.port}"\n{trust}\n')
        self._environment = {**_environment(self.home), VARIABLE: str(self.relay), **environment}
        command = ["flower-superlink", *kind, *_identity(self.ca), "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = self.launch([*command, "--disable-runtime-dependency-installation"], self.home)
        self._wait_until_it_answers(f"{'https' if self.ca else 'http'}://127.0.0.1:{self.port}/health")

    def launch(self, command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a program in `folder`, below `home`, with the SuperLink's variables and `environment`.

        What it prints is in output.log there. Raises EngineError if there is no such program.
        """
        with (folder / "output.log").open("wb") as output:
            try:
                return subprocess.Popen(
                    command,
                    env={**self._environment, **(environment or {})},
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the terminal reaches us, not its processes
                )
            except FileNotFoundError:
                raise EngineError(
                    f"'{command[0]}' is neither in {Path(sys.executable).parent} nor on the PATH: "
                    "install Flower with `pip install 'flwr[simulation]'`."
                ) from None

    def _wait_until_it_answers(self, address: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        trust = ssl.create_default_context(cafile=self.ca)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust))
        while time.monotonic() < deadline:
            self.check()
            try:
                with direct.open(address, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise EngineError(f"Flower's SuperLink did not answer within {START_SECONDS:g} s.", tail=self.tail())

    # ------------------------------------------------------------------ use

    def check(self) -> None:
        """Raise EngineError if the SuperLink has ended."""
        if self._process is None or self._process.poll() is not None:
            raise EngineError("Flower's SuperLink ended unexpectedly.", tail=self.tail())

    def submit(self, app: Path, federation: Mapping[str, int | float], config: Path | None = None) -> str:
        """Start a run of the app folder `app`; returns its id. Raises EngineError if it is refused.

        Args:
            app: the folder.
            federation: Flower's settings of a simulation; {} for SuperNodes.
            config: a TOML file with the run config; None: what the app declares.
        """
        settings = " ".join(f"{key}={value}" for key, value in federation.items())
        options = ["--federation-config", settings] if settings else []
        options += ["--run-config", str(config)] if config else []
        answer = self._flwr("run", str(app), _CONNECTION, "--format", "json", *options)
        return str(answer["run-id"])

    def online(self) -> int:
        """How many SuperNodes are connected."""
        answer = self._flwr("supernode", "list", _CONNECTION, "--format", "json")
        return sum(node["status"] == "online" for node in answer["nodes"])

    def status(self, run: str) -> tuple[str, str]:
        """Status of `run` ('finished:completed' when all went well) and Flower's details about it."""
        answer = self._flwr("list", "--run-id", run, _CONNECTION, "--format", "json")
        found = answer["runs"][0]
        return str(found["status"]), str(found.get("status-details", ""))

    @contextmanager
    def log(self, run: str) -> Iterator[LogStream]:
        """The growing log of `run`; it ends when the run does."""
        process = subprocess.Popen(
            ["flwr", "log", run, _CONNECTION, "--stream"],
            env=self._environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stream = LogStream(process)
        try:
            yield stream
        finally:
            stream.close()

    def tail(self, lines: int = 20) -> tuple[str, ...]:
        """The last lines that the SuperLink and its processes printed."""
        output = self.home / "output.log"
        return tuple(output.read_text(errors="replace").splitlines()[-lines:]) if output.exists() else ()

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """The answer of a `flwr` command in JSON. Raises EngineError if it reports a failure."""
        try:
            done = subprocess.run(
                ["flwr", *arguments],
                env=self._environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"`flwr {arguments[0]}` took more than {COMMAND_SECONDS:g} s.", tail=self.tail()) from None
        answer = _json_in(done.stdout)
        if done.returncode != 0 or not answer.get("success"):
            said = str(answer.get("error-message", "")).strip() or done.stderr.strip() or done.stdout.strip() or "nothing"
            raise EngineError(f"`flwr {arguments[0]}` failed: {said}", tail=self.tail())
        return answer

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """End every process that came from this SuperLink and remove its folder. Ctrl-C cannot interrupt it."""
        with undisturbed():
            end_all(self.home, self._process)
            shutil.rmtree(self.home, ignore_errors=True)
            self._janitor.communicate()


def _identity(ca: Path | None) -> list[str]:
    """Options by which the SuperLink is told who it is; with TLS, a new certificate beside that of its new CA."""
    if ca is None:
        return ["--insecure"]
    authority = Authority.create()
    server, certificate, key = authority.issue(LOOPBACK), ca.with_name("server.pem"), ca.with_name("server.key")
    for path, content in ((ca, authority.pair.certificate), (certificate, server.certificate), (key, server.key)):
        path.write_bytes(content)
    return ["--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]


def _janitor(home: Path) -> subprocess.Popen[bytes]:
    """A process that does what `close` does, should this process be killed before."""
    return subprocess.Popen(
        [sys.executable, "-m", "simulations.engines.janitor", str(home)],
        env=_environment(home) | {"FLWR_HOME": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


class LogStream:
    """Lines of a process's output as they come, without waiting for them."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._lock:
                self._lines.append(line.decode(errors="replace").rstrip())

    @property
    def ended(self) -> bool:
        """Whether there is no more to come than what `read` returns next."""
        return not self._thread.is_alive()

    def read(self) -> list[str]:
        """The lines since the last call."""
        with self._lock:
            lines, self._lines = self._lines, []
        return lines

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._thread.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _environment(home: Path) -> dict[str, str]:
    """This process's environment with Flower's and Ray's switches, and with the same fedtune importable from anywhere."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}  # no foreign Ray cluster
    ours = str(Path(fedtune.__file__).parents[1])
    paths = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if ours not in (*paths, *site.getsitepackages(), site.getusersitepackages()):
        paths.append(ours)
    programs = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    places = {"PATH": programs, "PYTHONPATH": os.pathsep.join(paths), "FLWR_HOME": str(home), "RAY_TMPDIR": str(home)}
    proxies = {name: f"{environment.get(name, '')},127.0.0.1".lstrip(",") for name in ("NO_PROXY", "no_proxy")}
    return {**environment, **_SWITCHES, **places, **proxies}


def _short_temporary() -> str:
    """The temporary folder, or /tmp where that one's path is too long for Ray's sockets (macOS)."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _LONGEST_TEMPORARY or not os.path.isdir("/tmp") else "/tmp"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _json_in(text: str) -> dict[str, Any]:
    """The JSON object that `text` ends with, {} if there is none; warnings may precede it."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
