"""Two machines for whoever types docs/deployment.md: network namespaces of one Linux, each with address, home and shell."""

from __future__ import annotations

import os
import re
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "deployment.md"
PROGRAMS = ("fedtune", "flwr", "flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp")

# What a container lacks, or what would take minutes: packages that are installed, a service manager, a firewall, ssh, and pip.
STAND_INS = {
    "sudo": 'exec "$@"',
    "apt-get": "exit 0",
    "systemctl": "exit 0",
    "ufw": "exit 0",
    "scp": 'exec cp -pr "$2" "$OTHER_HOME/${3#B:}"',
    "make": '[ "$1" = install ] && exec "$PYTHON_OF_TESTS" "$MAKES_ENVIRONMENT" .venv\nexec /usr/bin/make "$@"',
}


def blocks(section: str) -> list[str]:
    """The shell blocks of a section of the guide, in order."""
    text = GUIDE.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert found, section
    return re.findall(r"```bash\n(.*?)```", found[1], flags=re.DOTALL)


class Shell:
    """A person at one machine: what is typed runs in one shell, which ends at the first command that fails."""

    def __init__(self, home: Path, prefix: list[str], environment: Mapping[str, str]) -> None:
        self.home = home
        self.log = home / "typed.log"
        self._output = self.log.open("wb")
        self._process = subprocess.Popen(
            [*prefix, "bash", "-e"],
            cwd=home,
            env={**environment, "HOME": str(home)},
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def type(self, text: str) -> None:
        """Run a block to its end. Fails if a command of it does."""
        done = self.home / "done"
        done.unlink(missing_ok=True)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{text}\necho >{done}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        while not done.exists():
            try:
                self._process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            assert done.exists(), f"this failed:\n{text}\n{self.said()}"

    def said(self) -> str:
        """All that was printed."""
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Log out."""
        self._process.kill()
        self._process.communicate()
        self._output.close()


@dataclass
class Network:
    """How commands get onto each of two machines, and the address of the first."""

    prefixes: tuple[list[str], list[str]]
    server: str


@contextmanager
def two_namespaces() -> Iterator[Network]:
    """Two hosts with a cable between them. Raises OSError or CalledProcessError where this is not permitted."""
    names, links = [f"ft{os.getpid()}{end}" for end in "ab"], [f"v{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", link)
            for device in ("lo", link):
                _ip("-n", name, "link", "set", device, "up")
        yield Network((["ip", "netns", "exec", names[0]], ["ip", "netns", "exec", names[1]]), "10.77.0.1")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)


def stand_ins(folder: Path) -> Path:
    """A folder for the front of PATH."""
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def end_what_works_in(folder: Path) -> list[str]:
    """Kill every process that works in `folder`; returns their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(folder) and int(process.name) != os.getpid():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue
    return found


def make_environment(folder: Path) -> None:
    """What `make install` would leave, without a download: an environment with the libraries of this one and the clone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder.resolve() / "bin" / "python"
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (purelib / "clone.pth").write_text("\n".join([str(folder.resolve().parent), *site.getsitepackages()]) + "\n")
    for name in PROGRAMS:
        there = Path(sys.executable).parent / name
        lines = there.read_text().splitlines(keepends=True)
        (folder / "bin" / name).write_text("".join([f"#!{python}\n", *lines[1:]]))
        shutil.copymode(there, folder / "bin" / name)


if __name__ == "__main__":
    make_environment(Path(sys.argv[1]))
