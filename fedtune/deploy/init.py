"""Writing a deployment: for its owner alone, whatever the umask; each machine's folder has what that machine needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedtune.deploy import handbook
from fedtune.deploy.certificates import AUTHORITY_DAYS, Authority, Pair, node_key
from fedtune.deploy.node import scripts_of_node, texts_of_node
from fedtune.deploy.plan import AUTHORITY, NODES, PLAN, SERVER, Plan
from fedtune.deploy.server import scripts_of_server, texts_of_server
from fedtune.errors import DeployError
from fedtune.private import make_folder

FILE, EXECUTABLE = 0o600, 0o700

_Files = dict[str, tuple[bytes, int]]  # path below the deployment -> content, mode


def create(folder: Path, plan: Plan, force: bool = False) -> list[Path]:
    """Write a new deployment to `folder`; returns its files.

    Args:
        folder: made if it is missing.
        plan: what to write.
        force: overwrite what is there. All keys are new then: every node needs its new folder.

    Raises:
        DeployError: a file exists already, or cannot be written.
    """
    authority = Authority.create()
    files: _Files = {
        f"{AUTHORITY}/ca.key": (authority.pair.key, FILE),
        f"{AUTHORITY}/ca.pem": (authority.pair.certificate, FILE),
        f"{SERVER}/ca.pem": (authority.pair.certificate, FILE),
        **_pair(f"{SERVER}/superlink", authority.issue(["localhost"], AUTHORITY_DAYS)),
        **_pair(f"{SERVER}/server", authority.issue(plan.hosts)),
        **_texts(SERVER, texts_of_server(plan), FILE),
        **_texts(SERVER, scripts_of_server(), EXECUTABLE),
    }
    for name in plan.nodes:
        files |= _node_files(plan, name, authority.pair.certificate)
    files |= _about(plan)
    return _write_all(folder, files, force)


def add_nodes(folder: Path, names: list[str]) -> list[Path]:
    """Write the folders of further nodes and nothing else but deployment.json and README.md; returns the new files.

    Raises:
        DeployError: no deployment in `folder`, or a name is taken.
    """
    plan = Plan.read(folder)
    certificate = _read(folder / AUTHORITY / "ca.pem")
    files: _Files = {}
    for name in names:
        plan = plan.with_node(name)
        files |= _node_files(plan, name, certificate)
    written = _write_all(folder, files, force=False)
    _write_all(folder, _about(plan), force=True)
    return written


def renew(folder: Path) -> list[Path]:
    """Write a new server certificate and key, for the same names, signed by the same CA; returns both files.

    Raises:
        DeployError: no deployment in `folder`, or its CA is not there.
    """
    plan = Plan.read(folder)
    try:
        authority = Authority.read(_read(folder / AUTHORITY / "ca.pem"), _read(folder / AUTHORITY / "ca.key"))
    except ValueError as error:
        raise DeployError(f"The CA in '{folder / AUTHORITY}' cannot be used ({error}): restore ca.key and ca.pem.") from None
    return _write_all(folder, _pair(f"{SERVER}/server", authority.issue(plan.hosts)), force=True)


def _node_files(plan: Plan, name: str, certificate: bytes) -> _Files:
    private, public = node_key(name)
    home = f"{NODES}/{name}"
    return {
        f"{home}/node.key": (private, FILE),
        f"{home}/ca.pem": (certificate, FILE),
        **_texts(home, texts_of_node(plan, name), FILE),
        **_texts(home, scripts_of_node(), EXECUTABLE),
        f"{SERVER}/nodes/{name}.pub": (public, FILE),
    }


def _about(plan: Plan) -> _Files:
    return {
        PLAN: (plan.as_text().encode(), FILE),
        "README.md": (handbook.readme(plan).encode(), FILE),
    }


def _pair(stem: str, pair: Pair) -> _Files:
    return {f"{stem}.key": (pair.key, FILE), f"{stem}.pem": (pair.certificate, FILE)}


def _texts(home: str, texts: Mapping[str, str], mode: int) -> _Files:
    return {f"{home}/{name}": (text.encode(), mode) for name, text in texts.items()}


def _write_all(folder: Path, files: _Files, force: bool) -> list[Path]:
    existing = sorted(name for name in files if (folder / name).exists())
    if existing and not force:
        raise DeployError(
            f"'{folder / existing[0]}' exists{f' ({len(existing)} such files)' if len(existing) > 1 else ''}: "
            "give another folder, --add-node or --renew to change a part, or --force to make everything anew, keys included."
        )
    try:
        for name, (content, mode) in files.items():
            _write(folder / name, content, mode)
    except OSError as error:
        raise DeployError(f"'{error.filename}' cannot be written: {error.strerror}.") from None
    return [folder / name for name in files]


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file that at no moment has another mode or half its content."""
    make_folder(path.parent, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask
        file.write(content)
    temporary.replace(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DeployError(
            f"'{path}' cannot be read ({error.strerror}): the CA's folder has to be where `fedtune deploy init` wrote it."
        ) from None
