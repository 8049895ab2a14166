"""Running many runs: each in a process of its own, several at a time, carried on where an earlier call stopped.

The processes are forked from one that has imported everything and touched nothing (multiprocessing's fork server), since
importing takes longer than a small run does; where a system has none, each starts afresh.

A cell is a run folder with settings. A folder that is finished is not run again, one that was interrupted is resumed by its
ledger, and one that holds a run with other settings is refused, so nothing is ever overwritten.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from fedtune.config import RunConfig
from fedtune.errors import FedtuneError, Interrupted, RunFolderError
from fedtune.run_folder import CONFIG, RunFolder, replace_file

GROWING = "rounds"  # may be larger than what the folder has: the run is carried on
PLACES = ("out", "resume")  # where a run is says nothing about what it is
PRELOADED = ["fedtune.cli.main", "server.app", "client.app", "simulations.engines.in_process", "transformers.models.llama"]
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
    running: set[BaseProcess] = set()
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


def _run(cell: Cell, place: str, running: set[BaseProcess], lock: threading.Lock) -> Outcome:
    summary = finished(cell)
    if summary is not None:
        return Outcome(cell, summary, again=False)
    arguments, said = _arguments(cell), cell.folder.with_name(f"{cell.folder.name}.log")
    with lock:
        process = _start(arguments, said, place)
        running.add(process)
    process.join()
    with lock:
        running.discard(process)
    summary = finished(cell) if process.exitcode == 0 else None
    return Outcome(cell, summary, "" if summary is not None else _last_line(said, process.exitcode or 0))


def _start(arguments: Sequence[str], said: Path, place: str) -> BaseProcess:
    """A new process of `fedtune` with these arguments; what it prints goes to the file `said`."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(PRELOADED)
    process: BaseProcess = context.Process(target=_child, args=(list(arguments), str(said), place))
    process.start()
    return process


def _child(arguments: list[str], said: str, place: str) -> None:
    """What a process does. It has no terminal: Ctrl-C there is for the one that waits, which asks this one to end."""
    os.setsid()
    if place:
        os.environ["CUDA_VISIBLE_DEVICES"] = place
    with open(said, "w", encoding="utf-8", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        from fedtune.cli.main import main

        main(arguments)


def finished(cell: Cell) -> dict[str, Any] | None:
    """The summary of a run that has all its rounds; None if it has to run, or run on."""
    try:
        summary = RunFolder.open(cell.folder).summary()
    except FedtuneError:
        return None
    return summary if summary.get("rounds") == cell.settings.rounds else None


def _arguments(cell: Cell) -> list[str]:
    """What runs the cell, or carries it on."""
    if cell.folder.exists():
        return ["simulate", "--resume", str(cell.folder), "--set", f"rounds={cell.settings.rounds}", "--quiet", "--json"]
    preset = cell.folder.with_name(f"{cell.folder.name}.toml")
    preset.parent.mkdir(parents=True, exist_ok=True)
    replace_file(preset, as_toml(cell.settings).encode())
    return ["simulate", str(preset), "--out", str(cell.folder), "--quiet", "--json"]


def as_toml(settings: RunConfig) -> str:
    """The settings as a flat preset, without the folder."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.as_mapping().items() if key not in PLACES]
    return "\n".join([*lines, ""])


def _last_line(said: Path, code: int) -> str:
    """Why a run failed: the last line that it printed."""
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else f"The run ended with code {code} and said nothing ('{said}')."


def _end(running: set[BaseProcess], lock: threading.Lock) -> None:
    """Let the processes stop after the step in hand; kill those that do not."""
    with lock:
        ending = list(running)
    for process in ending:
        process.terminate()
    until = time.monotonic() + KILL_AFTER
    for process in ending:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
