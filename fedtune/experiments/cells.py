"""Running many runs: each in a process of its own, several at a time, carried on where an earlier call stopped.

A cell is a run folder with settings. A folder that is finished is not run again, one that was interrupted is resumed by its
ledger, and one that holds a run with other settings is refused, so nothing is ever overwritten.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from fedtune.config import RunConfig
from fedtune.errors import FedtuneError, Interrupted, RunFolderError
from fedtune.run_folder import CONFIG, RunFolder, replace_file

GROWING = "rounds"  # may be larger than what the folder has: the run is carried on
PLACES = ("out", "resume")  # where a run is says nothing about what it is
KILL_AFTER = 20.0  # seconds that a process has to end after it was asked to


@dataclass(frozen=True)
class Cell:
    """One run: how it is called, and its settings with `out`, its folder."""

    name: str
    settings: RunConfig

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.settings.out)


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: the summary of its run, or the problem in one sentence; `again` if it had to run at all."""

    cell: Cell
    summary: dict[str, Any] | None
    problem: str = ""
    again: bool = True


def run_cells(cells: Sequence[Cell], *, workers: int = 0, done: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
    """Run what is not finished; the outcomes in the order of `cells`.

    Args:
        cells: with folders of their own.
        workers: runs at a time; 0: one a GPU, or one a CPU core.
        done: called after each cell, one call at a time.

    Raises:
        RunFolderError: a folder holds another run; nothing was started.
        Interrupted: Ctrl-C, or a request to end; the runs stop after the step in hand, and the same call carries them on.
    """
    for cell in cells:
        _check(cell)
    places = _places(workers, cells)
    running: set[subprocess.Popen[str]] = set()
    lock = threading.Lock()
    found: dict[int, Outcome] = {}

    def work(number: int) -> int:
        place = places.get()
        try:
            found[number] = _run(cells[number], place, running, lock)
        finally:
            places.put(place)
        return number

    with _ending_like_ctrl_c(), ThreadPoolExecutor(places.qsize()) as pool:
        futures = [pool.submit(work, number) for number in range(len(cells))]
        try:
            for future in as_completed(futures):
                done(found[future.result()])
        except BaseException as error:
            for future in futures:
                future.cancel()
            _end(running, lock)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted("Stopped; the same command carries on what is not finished.") from None
            raise
    return [found[number] for number in range(len(cells))]


@contextmanager
def _ending_like_ctrl_c() -> Iterator[None]:
    """Inside the `with` block a request to end, or a terminal that goes, is a KeyboardInterrupt, as Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in asked]
    try:
        yield
    finally:
        for number, handler in zip(asked, before, strict=True):
            signal.signal(number, handler)


def _places(workers: int, cells: Sequence[Cell]) -> SimpleQueue[str]:
    """One entry for each run at a time: the GPU that it may see, or ""."""
    gpus = torch.cuda.device_count() if any(cell.settings.device in ("auto", "cuda") for cell in cells) else 0
    count = workers or gpus or os.cpu_count() or 1
    places: SimpleQueue[str] = SimpleQueue()
    for number in range(max(1, min(count, len(cells) or 1))):
        places.put(str(number % gpus) if gpus else "")
    return places


def _check(cell: Cell) -> None:
    """Refuse a folder with another run in it."""
    if not cell.folder.exists():
        return
    stored = RunFolder.open(cell.folder).read_json(CONFIG)["used"]
    wanted = cell.settings.as_mapping()
    other = [key for key in wanted if key not in (GROWING, *PLACES) and stored.get(key) != wanted[key]]
    if other or stored.get(GROWING, 0) > cell.settings.rounds:
        names = ", ".join(other or [GROWING])
        raise RunFolderError(f"'{cell.folder}' holds a run with other settings ({names}): give another --out, or remove it.")


def _run(cell: Cell, place: str, running: set[subprocess.Popen[str]], lock: threading.Lock) -> Outcome:
    summary = finished(cell)
    if summary is not None:
        return Outcome(cell, summary, again=False)
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": place} if place else {})}
    with lock:
        process = subprocess.Popen(
            _command(cell), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        running.add(process)
    _, said = process.communicate()
    with lock:
        running.discard(process)
    summary = finished(cell) if process.returncode == 0 else None
    return Outcome(cell, summary, "" if summary is not None else _last_line(said, process.returncode))


def finished(cell: Cell) -> dict[str, Any] | None:
    """The summary of a run that has all its rounds; None if it has to run, or run on."""
    try:
        summary = RunFolder.open(cell.folder).summary()
    except FedtuneError:
        return None
    return summary if summary.get("rounds") == cell.settings.rounds else None


def _command(cell: Cell) -> list[str]:
    """What runs the cell, or carries it on."""
    program = [sys.executable, "-m", "fedtune.cli", "simulate"]
    if cell.folder.exists():
        return [*program, "--resume", str(cell.folder), "--set", f"rounds={cell.settings.rounds}", "--quiet", "--json"]
    preset = cell.folder.with_name(f"{cell.folder.name}.toml")
    preset.parent.mkdir(parents=True, exist_ok=True)
    replace_file(preset, as_toml(cell.settings).encode())
    return [*program, str(preset), "--out", str(cell.folder), "--quiet", "--json"]


def as_toml(settings: RunConfig) -> str:
    """The settings as a flat preset, without the folder."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.as_mapping().items() if key not in PLACES]
    return "\n".join([*lines, ""])


def _last_line(said: str, code: int) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else f"The run ended with code {code} and said nothing."


def _end(running: set[subprocess.Popen[str]], lock: threading.Lock) -> None:
    """Let the processes stop after the step in hand; kill those that do not."""
    with lock:
        ending = list(running)
    for process in ending:
        process.terminate()
    for process in ending:
        try:
            process.wait(KILL_AFTER)
        except subprocess.TimeoutExpired:
            process.kill()
