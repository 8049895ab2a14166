"""The machine: packages with the versions that this fedtune needs, Flower's programs, disk space, the SuperNode, the device."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from fedtune.deploy.check.findings import Finding, good, warn, wrong
from fedtune.errors import ModelError

LEAST_FREE, FEW_FREE = 1 << 30, 5 << 30  # bytes
SUPERNODE = "client.supernode"  # supernode.sh starts it
_SHOWN = ("fedtune", "flwr", "torch", "transformers")


def packages() -> Iterator[Finding]:
    """Every requirement of the installed fedtune, without extras, against what is installed."""
    try:
        lines = metadata.requires("fedtune") or []
    except metadata.PackageNotFoundError:
        yield wrong("packages", "fedtune is not installed in this environment.", "Run `pip install .` in a clone of fedtune.")
        return
    bad = [text for line in lines if (text := _unmet(line))]
    for text in bad:
        yield wrong("packages", text, "Run `pip install .` in the clone of fedtune, with this environment active.")
    if not bad:
        yield good("packages", ", ".join(f"{name} {metadata.version(name)}" for name in _SHOWN))


def _unmet(line: str) -> str:
    """Why the requirement `line` is not met; '' if it is, or does not apply here."""
    try:
        needed = Requirement(line)
    except InvalidRequirement:
        return f"fedtune's requirement '{line}' cannot be read."
    if needed.marker and not needed.marker.evaluate({"extra": ""}):
        return ""
    try:
        found = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return f"{needed.name}{needed.specifier} is needed, and {needed.name} is not installed."
    if needed.specifier.contains(found, prereleases=True):
        return ""
    return f"{needed.name}{needed.specifier} is needed, and {needed.name} {found} is installed."


def programs(settings: Mapping[str, str], names: Sequence[str]) -> Iterator[Finding]:
    """The programs that the scripts start, where the scripts look for them: BIN, then the PATH."""
    chosen, path = settings.get("BIN", ""), _path(settings)
    for name in names:
        found = shutil.which(name, path=path)
        if found is None:
            install = "Install nginx (Debian, Ubuntu: `apt install nginx-light`)." if name == "nginx" else _SET_BIN
            yield wrong("programs", f"{name} is neither in BIN = '{chosen}' nor on the PATH.", install)
        elif chosen and name != "nginx" and Path(found).parent != Path(chosen):
            yield wrong("programs", f"BIN = '{chosen}' has no {name}; {found} would be started.", _SET_BIN)
        else:
            yield good("programs", found)


def _path(settings: Mapping[str, str]) -> str:
    """As in environment.sh."""
    chosen = settings.get("BIN", "")
    places = [chosen] if chosen else []
    return os.pathsep.join([*places, os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"])


def supernode(settings: Mapping[str, str]) -> Finding:
    """Whether the python3 of the scripts has the module that is a node's SuperNode."""
    python = shutil.which("python3", path=_path(settings)) or "python3"
    try:
        done = subprocess.run([python, "-P", "-c", f"import {SUPERNODE}"], capture_output=True, timeout=60, check=False)
        missing = done.returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        missing = True
    if missing:
        return wrong("SuperNode", f"{python} cannot import {SUPERNODE}, which supernode.sh starts.", _SET_BIN)
    return good("SuperNode", f"{python} -m {SUPERNODE}")


def supernode_at(port: int) -> int:
    """The process id of a SuperNode on this machine with runtime port `port`; 0 if none is seen (Linux)."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if SUPERNODE in words and ["--port", str(port)] in map(list, itertools.pairwise(words)):
                return int(path.parent.name)
    return 0


_SET_BIN = "Set BIN in the .env file to the bin folder of the environment that has fedtune."


def disk(folder: Path) -> Finding:
    """Free space where the folder is."""
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free at '{folder}'."
    if free < LEAST_FREE:
        return wrong("disk", text, "Make room: Flower's state, its copies of the app and logs are written here.")
    if free < FEW_FREE:
        return warn("disk", text, "Make room before a long run.")
    return good("disk", text)


def device(asked: str) -> Finding:
    """The device of the node."""
    from fedtune.models import choose_device

    try:
        return good("device", choose_device(asked)[1])
    except ModelError as error:
        return wrong(
            "device", str(error), "Set DEVICE in node.env; for a GPU that is there, install its driver and torch for it."
        )
