"""Commands to a run that goes on, and what it says of itself: small files in its folder, which any process there may use.

    control/NAME.json   one command each, in the order of their names; the server takes them between rounds
    status.json         what the run does now

A command is written whole or not at all, carried out once (its name is in the ledger when it was), and removed. What the
server does not know, or cannot do, is refused by name and written down as refused.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from fedtune.errors import ControlError, LockedLedgerError
from fedtune.ledger_file import LEDGER, lock
from fedtune.private import FOLDER
from fedtune.run_folder import RunFolder

CONTROL, STATUS = "control", "status.json"
MOST_BYTES = 4096  # of a command


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
            said = json.loads(data)
        except ValueError:
            raise ControlError("A command is not JSON.") from None
        if not isinstance(said, dict) or set(said) != {"command", "client"} or not isinstance(said["client"], str):
            raise ControlError(f"A command needs 'command' and 'client', not {str(said)[:80]}.")
        if said["command"] not in tuple(Command):
            raise ControlError(f"There is no command {str(said['command'])[:80]!r}: use one of {', '.join(Command)}.")
        order = cls(Command(said["command"]), said["client"])
        if bool(order.client) != (order.command is Command.DROP):
            raise ControlError("drop needs a client, and nothing else takes one.")
        return order


def send(folder: RunFolder, order: Order) -> None:
    """Leave a command for the run in `folder`.

    Raises:
        ControlError: nobody carries on the run, so that nobody would follow. A client can be dropped before a resume.
    """
    if order.command is not Command.DROP and not is_live(folder.path):
        raise ControlError(
            f"Nobody carries on the run in '{folder.path}', so there is nothing to {order.command}: "
            f"`fedtune simulate --resume {folder.path}` would carry it on."
        )
    target = folder.path / CONTROL
    target.mkdir(FOLDER, exist_ok=True)
    name = f"{time.time_ns():020d}-{os.getpid()}.json"
    text = json.dumps({"command": order.command.value, "client": order.client})
    RunFolder(target).write_bytes(name, text.encode())


def waiting(folder: RunFolder) -> Iterator[Path]:
    """The commands that nobody has followed yet, oldest first."""
    yield from sorted((folder.path / CONTROL).glob("[!.]*.json"))


def is_live(folder: Path) -> bool:
    """Whether a process on this machine carries on the run in `folder`."""
    if not (folder / LEDGER).exists():
        return False
    try:
        lock(folder).release()
    except LockedLedgerError:
        return True
    return False


def say(folder: RunFolder, doing: Doing, **more: Any) -> None:
    """Write status.json."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    folder.write_json(STATUS, {"doing": doing.value, "pid": os.getpid(), "host": socket.gethostname(), "at": now, **more})


def said(folder: RunFolder) -> dict[str, Any]:
    """status.json; {} before there is one. `doing` is "died" where a process says that it goes on, but is gone."""
    if not (folder.path / STATUS).exists():
        return {}
    status: dict[str, Any] = folder.read_json(STATUS)
    if status.get("doing") in (Doing.RUNNING, Doing.PAUSED) and not is_live(folder.path):
        return {**status, "doing": "died"}
    return status
