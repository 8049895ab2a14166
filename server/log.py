"""The structured log of a run: log.jsonl in its folder, one JSON object an event, without secrets and control characters.

It is for people and for programs that watch; the truth is the ledger. Steps and evaluation progress are left out, there are
too many of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.foreign import for_file
from fedtune.progress import ClientFinished, ClientStep, EvaluationStep, Event, Note, listening
from fedtune.run_folder import appending

LOG = "log.jsonl"


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Write every event inside the `with` block, and the error that ends it; goes on where an earlier process ended."""
    descriptor = appending(folder / LOG)
    try:
        with listening(lambda event: _write(descriptor, event)):
            yield
    except BaseException as error:
        _append(descriptor, "error", type(error).__name__, {"text": str(error)})
        raise
    finally:
        os.close(descriptor)


def _write(descriptor: int, event: Event) -> None:
    if isinstance(event, ClientStep | EvaluationStep):
        return
    warns = (isinstance(event, Note) and event.warning) or (isinstance(event, ClientFinished) and event.problem)
    _append(descriptor, "warning" if warns else "info", type(event).__name__, asdict(event))


def _append(descriptor: int, level: str, name: str, fields: dict[str, Any]) -> None:
    """One line by one write, so that lines never mix. A log that cannot be written stops no run."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": now, "pid": os.getpid(), "level": level, "event": name, **_harmless(fields)}
    with suppress(OSError):
        os.write(descriptor, json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _harmless(value: Any) -> Any:
    """`value` with `for_file` on every text in it; what JSON does not know becomes text."""
    if isinstance(value, dict):
        return {for_file(str(key)): _harmless(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_harmless(item) for item in value]
    return value if isinstance(value, bool | int | float | None) else for_file(str(value))
