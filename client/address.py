"""Where the worker of a device listens, and who may get there: a private folder, a socket, and the locks beside it.

`unix:PATH` is a socket. `tcp:PATH` is a file with a port on the loopback interface and a random token, for platforms
without Unix sockets. Both are of this user alone (0600, in a folder of 0700), which is checked before anything is sent.
Beside them lie NAME.life, locked as long as the worker lives, NAME.start, locked by whoever starts one, and NAME.log.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import ConfigError, WorkerAccessError, WorkerError
from fedtune.private import make_folder

LONGEST_SOCKET = 100  # characters; the kernels' limits are 107 (Linux) and 103 (macOS)
_POLL_SECONDS = 0.02
_BESIDE = (".life", ".start", ".log")
_KINDS = {"folder": stat.S_ISDIR, "socket": stat.S_ISSOCK, "file": stat.S_ISREG}


@dataclass(frozen=True)
class Address:
    """Where a worker listens.

    Attributes:
        kind: "unix" or "tcp".
        path: the socket, or the file with port and token.
    """

    kind: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that `text` writes. Raises ConfigError if it is none."""
        kind, colon, path = text.partition(":")
        if kind not in ("unix", "tcp") or not colon or not Path(path).is_absolute() or Path(path).suffix in _BESIDE:
            raise ConfigError(f"'{text}' is not the address of a worker: write unix:/absolute/path or tcp:/absolute/path.")
        if kind == "unix" and len(os.fsencode(path)) > LONGEST_SOCKET:
            raise ConfigError(f"The path of a socket has at most {LONGEST_SOCKET} characters, '{path}' has {len(path)}.")
        return cls(kind, Path(path))

    @classmethod
    def own(cls, device: str) -> Address:
        """The address of this user's worker for `device` among the devices that this process may see.

        The environment variable FEDTUNE_WORKERS names another folder than the usual one.
        """
        seen = [device, *(os.environ.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"))]
        name = re.sub(r"[^a-z0-9]", "", device.lower())[:12]
        name = f"{name}-{hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:8]}"
        folder = runtime_folder()
        fits = hasattr(socket, "AF_UNIX") and len(os.fsencode(folder / f"{name}.sock")) <= LONGEST_SOCKET
        return cls("unix", folder / f"{name}.sock") if fits else cls("tcp", folder / f"{name}.port")

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"

    @property
    def life(self) -> Path:
        """The file that a worker locks as long as it lives, with its process id."""
        return self.path.with_suffix(".life")

    @property
    def start(self) -> Path:
        """The file that is locked while a worker is started."""
        return self.path.with_suffix(".start")

    @property
    def log(self) -> Path:
        """What a worker in the background says."""
        return self.path.with_suffix(".log")

    # ------------------------------------------------------------------ the worker's side

    def prepare(self) -> None:
        """Make the folder, and take away what a dead worker left. Call with `life` locked."""
        private_folder(self.path.parent)
        self.path.unlink(missing_ok=True)

    def publish(self, port: int, token: str) -> None:
        """Let forwarders in who have no Unix sockets: write port and token."""
        new = self.path.with_suffix(f".{secrets.token_hex(4)}")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"port": port, "token": token}, file)
        new.replace(self.path)

    # ------------------------------------------------------------------ the forwarder's side

    def target(self) -> tuple[str, str] | None:
        """gRPC's name of the worker and its token ("": none needed); None if no process holds the address.

        A port that a dead worker had may be another program's by now, which then never gets the token.

        Raises:
            WorkerAccessError: folder or file belong to somebody else or are open to others.
        """
        try:
            check_private(self.path.parent, "folder")
            if self.pid() is None:
                return None
            check_private(self.path, "socket" if self.kind == "unix" else "file")
            if self.kind == "unix":
                return f"unix:{self.path}", ""
            return _port_and_token(self.path)
        except FileNotFoundError:
            return None

    def pid(self) -> int | None:
        """The process that holds `life`, 0 if it has not written its id yet, None if there is none."""
        try:
            descriptor = os.open(self.life, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            text = os.read(descriptor, 32).decode("ascii", "replace").strip()
            return int(text) if text.isdecimal() else 0
        finally:
            os.close(descriptor)


def runtime_folder() -> Path:
    """The private folder of this user's workers."""
    if asked := os.environ.get("FEDTUNE_WORKERS"):
        return Path(asked).absolute()
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if session and os.access(session, os.W_OK) and os.stat(session).st_uid == os.getuid():
        return Path(session) / "fedtune"
    return Path(tempfile.gettempdir()) / f"fedtune-{os.getuid()}"


def private_folder(folder: Path) -> None:
    """Make `folder` for its owner alone, or check that it is so. Raises WorkerAccessError if it is not."""
    make_folder(folder, exist_ok=True)
    check_private(folder, "folder")


def check_private(path: Path, what: str) -> None:
    """Raise WorkerAccessError unless `path` itself, no link, is a `what` ("folder", "socket", "file") of this user alone."""
    state = os.lstat(path)
    if not _KINDS[what](state.st_mode):
        raise WorkerAccessError(f"'{path}' should be a {what} and is something else: remove it.", path=str(path))
    if state.st_uid != os.getuid():
        raise WorkerAccessError(
            f"The {what} '{path}' belongs to user {state.st_uid}, not to user {os.getuid()}: remove it, run the SuperNode as "
            "that user, or set FEDTUNE_WORKERS to a folder of your own.",
            path=str(path),
        )
    if state.st_mode & 0o077:
        found, right = stat.S_IMODE(state.st_mode), 700 if what == "folder" else 600
        raise WorkerAccessError(
            f"The {what} '{path}' is open to other users (mode {found:o}): chmod {right} '{path}'.", path=str(path)
        )


def _port_and_token(path: Path) -> tuple[str, str]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, encoding="utf-8") as file:
        text = file.read(4096)
    try:
        found = json.loads(text)
        return f"127.0.0.1:{int(found['port'])}", str(found["token"])
    except (ValueError, KeyError, TypeError):
        raise WorkerAccessError(f"'{path}' does not hold the port and token of a worker: remove it.", path=str(path)) from None


@contextmanager
def locked(path: Path, seconds: float, write: str = "") -> Iterator[None]:
    """Hold the lock of `path`, alone among all processes; a process that ends, however it does, gives its locks back.

    Args:
        path: the file, which stays.
        seconds: to wait for another holder.
        write: what the file says while it is held.

    Raises:
        WorkerError: it was not to be had in time.
    """
    private_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _take(descriptor, path, time.monotonic() + seconds)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, write.encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise WorkerError(f"Another process holds '{path}'.", path=str(path)) from None
            time.sleep(_POLL_SECONDS)
