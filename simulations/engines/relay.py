"""What a run in other processes says, carried to the process that started it: events and the error, line by line in a file.

The ServerApp and the ClientApps of Flower's simulation run in processes of their own, where nobody listens to
`fedtune.progress`. There, `relaying` appends every event to the file that the environment variable names; here, `Reader`
follows the file. A line is one JSON object, appended by a single write, so lines of several processes do not mix.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from fedtune import errors
from fedtune.errors import EngineError, FedtuneError
from fedtune.progress import Event, listening

VARIABLE = "FEDTUNE_RELAY"  # path of the file; unset: nobody is interested

_EVENTS: dict[str, type] = {kind.__name__: kind for kind in get_args(Event)}


@contextmanager
def relaying(*, with_error: bool) -> Iterator[None]:
    """Relay the events that happen inside the `with` block, and, if asked to, the exception that ends it."""
    path = os.environ.get(VARIABLE)
    if not path:
        yield
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        with listening(lambda event: _write(descriptor, {"event": type(event).__name__, "fields": asdict(event)})):
            yield
    except BaseException as error:
        if with_error:
            _write(descriptor, _describe(error))
        raise
    finally:
        os.close(descriptor)


class Reader:
    """Follows a relay file that need not exist yet. `error` is the exception that ended the ServerApp, if any came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: FedtuneError | None = None
        self._offset = 0

    def read(self) -> list[Event]:
        """The events since the last call, in the order of their lines."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        self._offset += len(whole) + 1 if whole else 0
        events = []
        for line in whole.splitlines():
            record = json.loads(line)
            if "event" in record:
                events.append(_event(record))
            else:
                self.error = _error(record)
        return events


def _write(descriptor: int, record: dict[str, Any]) -> None:
    os.write(descriptor, json.dumps(record, default=str).encode() + b"\n")


def _describe(error: BaseException) -> dict[str, Any]:
    facts = error.facts if isinstance(error, FedtuneError) else {}
    lines = "".join(traceback.format_exception(error)).splitlines()
    return {"error": type(error).__name__, "message": str(error), "facts": facts, "trace": lines}


def _event(record: dict[str, Any]) -> Event:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in record["fields"].items()}
    event: Event = _EVENTS[record["event"]](**fields)
    return event


def _error(record: dict[str, Any]) -> FedtuneError:
    """The same error as in the other process if it is fedtune's, else an EngineError with its text and last lines."""
    if record["error"] in errors.KINDS:
        return errors.named(record["error"])(record["message"], **record["facts"])
    return EngineError(
        f"The server stopped with {record['error']}: {record['message']}. This is a fault in fedtune or its set-up, "
        "not a setting: please report it with the lines above.",
        tail=tuple(record["trace"][-20:]),
    )
