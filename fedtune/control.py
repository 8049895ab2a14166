"""Commands to a run that goes on, and what it says of itself: small files in its folder, which any process there may use.

    control/NAME.json   one command each, in the order of their names; the server takes them between rounds
    status.json         what the run does now

A command is written whole or not at all, carried out once (its name is in the ledger when it was), and removed. What the
server does not know, or cannot do, is refused by name and written down as refused: so is whatever else somebody puts there.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from fedtune.bounded import BadJsonError, parse_json
from fedtune.errors import ControlError
from fedtune.foreign import client_id, for_screen
from fedtune.ledger_file import LEDGER, LOCK
from fedtune.only_one import is_held
from fedtune.private import FOLDER
from fedtune.regular import read_regular
from fedtune.run_folder import RunFolder

CONTROL, STATUS = "control", "status.json"
MOST_BYTES = 4096  # of a command
MOST_AT_ONCE = 100  # commands that are taken before the next round; the others wait
MOST_NAMES = 100_000  # entries of control/ that are looked at
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}\.json", re.ASCII)
_SAID: dict[str, type] = {
    "doing": str, "pid": int, "host": str, "at": str, "round": int, "rounds": int, "error": str,
}  # fmt: skip


class Command(StrEnum):
    """What a run can be told."""

    PAUSE = "pause"
    UNPAUSE = "unpause"
    STOP = "stop"
    DROP = "drop"
    EVALUATE = "evaluate"


class Doing(StrEnum):
    """What a run says that it does; one that died still says that it runs."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    FAILED = "failed"
    FINISHED = "finished"


@dataclass(frozen=True)
class Order:
    """A command, with the client that it is about (drop)."""

    command: Command
    client: str = ""

    @classmethod
    def read(cls, data: bytes) -> Order:
        """Raises ControlError for anything that `send` does not write."""
        try:
            said = parse_json(data)
        except BadJsonError as error:
            raise ControlError(f"A command is JSON, and this is none ({error}).") from None
        if not isinstance(said, dict) or set(said) != {"command", "client"} or not isinstance(said["client"], str):
            raise ControlError(f"A command needs 'command' and 'client', not {for_screen(str(said), 80)}.")
        if said["command"] not in tuple(Command):
            wrong = for_screen(str(said["command"]), 80)
            raise ControlError(f"There is no command '{wrong}': use one of {', '.join(Command)}.")
        order = cls(Command(said["command"]), said["client"])
        if bool(order.client) != (order.command is Command.DROP):
            raise ControlError("drop needs a client, and nothing else takes one.")
        return order.checked()

    def checked(self) -> Order:
        """Itself. Raises ControlError if its client cannot be one."""
        if self.client:
            client_id(self.client, ControlError, "`fedtune ledger show` lists the clients")
        return self

    @classmethod
    def at(cls, path: Path) -> Order:
        """The command in the file `path`. Raises ControlError for a file that `send` does not write."""
        if not _NAME.fullmatch(path.name):
            raise ControlError("A command's file has a name of letters, digits, - and _ and ends in .json.")
        try:
            return cls.read(read_regular(path, MOST_BYTES, follow=False))
        except OSError as error:
            raise ControlError(f"A command's file cannot be read: {error.strerror or type(error).__name__}.") from None


def send(folder: RunFolder, order: Order) -> None:
    """Leave a command for the run in `folder`.

    Raises:
        ControlError: nobody carries on the run, so that nobody would follow. A client can be dropped before a resume. Or the
            client has no id that a client can have.
    """
    if order.command is not Command.DROP and not is_live(folder.path):
        raise ControlError(
            f"Nobody carries on the run in '{folder.path}', so there is nothing to {order.command}: "
            f"`fedtune simulate --resume {shlex.quote(str(folder.path))}` would carry it on."
        )
    order.checked()
    target = folder.path / CONTROL
    try:
        target.mkdir(FOLDER, exist_ok=True)
    except OSError as error:
        raise ControlError(f"'{target}' cannot be made: {error.strerror}. Remove what is there.") from error
    if target.is_symlink():
        raise ControlError(f"'{target}' is a link to another place: a run takes commands from its own folder. Remove it.")
    name = f"{time.time_ns():020d}-{os.getpid()}.json"
    text = json.dumps({"command": order.command.value, "client": order.client})
    RunFolder(target).write_bytes(name, text.encode())


def waiting(folder: RunFolder) -> list[Path]:
    """Commands that nobody has followed yet, oldest first; MOST_AT_ONCE at most, and none from behind a link."""
    place = folder.path / CONTROL
    if place.is_symlink() or not place.is_dir():
        return []
    with suppress(FileNotFoundError), os.scandir(place) as entries:
        names = (entry.name for entry in itertools.islice(entries, MOST_NAMES))
        return [
            place / name
            for name in heapq.nsmallest(MOST_AT_ONCE, (n for n in names if n.endswith(".json") and not n.startswith(".")))
        ]
    return []


def remove(path: Path) -> None:
    """Remove what stands at `path` in control/, a folder too; what the system does not let us remove stays."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_live(folder: Path) -> bool:
    """Whether a process on this machine carries on the run in `folder`. Asking does not stand in the way of a resume."""
    return (folder / LEDGER).exists() and is_held(folder / LOCK)


def say(folder: RunFolder, doing: Doing, **more: Any) -> None:
    """Write status.json."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    folder.write_json(STATUS, {"doing": doing.value, "pid": os.getpid(), "host": socket.gethostname(), "at": now, **more})


def said(folder: RunFolder) -> dict[str, Any]:
    """status.json; {} before there is one. `doing` is "died" where a process says that it goes on, but is gone."""
    if not os.path.lexists(folder.path / STATUS):
        return {}
    found = folder.read_object(STATUS)
    status = {key: found[key] for key, kind in _SAID.items() if type(found.get(key)) is kind}
    if status.get("doing") in (Doing.RUNNING, Doing.PAUSED) and not is_live(folder.path):
        return {**status, "doing": "died"}
    return status
