"""Cells: runs of an experiment, each made by a process of its own, several at a time, and carried on where they stand.

A process a run, so that memory is freed and GPUs or cores are used in parallel. A cell whose folder is not there is started,
one whose run is shorter than asked is resumed, one that is finished is only read; so the same call again goes on where the
last one was stopped. The processes are forked from one that has imported everything and touched nothing (multiprocessing's
fork server), since importing takes longer than a small run does; where a system has none, each starts afresh.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Lock
from typing import Any

from fedtune import toml
from fedtune.config import RunConfig
from fedtune.errors import EngineError, FedtuneError, Interrupted, RunFolderError, UnchangedError
from fedtune.foreign import for_screen
from fedtune.private import make_folder, opener
from fedtune.regular import ANY, open_regular
from fedtune.report.table import measured
from fedtune.resume import stored_settings
from fedtune.run_folder import SUMMARY, RunFolder, replace_file

ERROR = "error.json"
TAIL = 400  # characters of what a failed process said last
STOPPED = 130  # exit code of a process that was told to stop
PRELOADED = ["fedtune.cli.main", "server.app", "client.app", "simulations.engines.in_process", "transformers.models.llama"]
SAID_AGAIN = ("rounds", "model", "revision", "data", "holdout_file", "trust_remote_code")  # what no folder decides
PATIENCE = 60.0  # seconds that a process gets to end after the step in hand


@dataclass(frozen=True)
class Cell:
    """One run: `settings.out` is its folder, `settings.rounds` how far it is to go."""

    name: str
    settings: RunConfig


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: its summary (summary.json), or None and the `problem` in a sentence; `again`: it had to run."""

    cell: Cell
    summary: Mapping[str, Any] | None
    problem: str = ""
    again: bool = True


@dataclass(frozen=True)
class Finished:
    """A cell has ended, the `done`-th of `total`."""

    outcome: Outcome
    done: int
    total: int


def run_cells(cells: Sequence[Cell], *, workers: int = 0, progress: Callable[[Finished], None] | None = None) -> list[Outcome]:
    """Bring every cell to its `rounds`; outcomes in the order of `cells`. A cell that fails does not end the others.

    Args:
        workers: processes at a time; 0: as many as there are GPUs (one each), or cores where the device is the CPU.
        progress: called after each cell, in this thread.

    Raises:
        RunFolderError: a folder of a cell holds a run with other settings; nothing was started.
        Interrupted: Ctrl-C, or a request to end; the processes were told to stop after the step in hand, and have ended.
    """
    for cell in cells:
        _refuse_another(cell)
    places = _places(cells, workers)
    office = _Office(places)
    outcomes: dict[str, Outcome] = {}
    with _ending_like_ctrl_c(), ThreadPoolExecutor(max(1, min(len(places), len(cells)))) as pool:
        futures = [pool.submit(office.run, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                outcome = future.result()
                outcomes[outcome.cell.name] = outcome
                if progress:
                    progress(Finished(outcome, len(outcomes), len(cells)))
        except KeyboardInterrupt:
            office.close()
            raise Interrupted("Stopped. What is finished is kept; the same command carries on from there.") from None
        except BaseException:
            office.close()
            raise
    return [outcomes[cell.name] for cell in cells]


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


def reached(folder: str | Path, rounds: int) -> bool:
    """Whether the run in `folder` has finished `rounds` rounds, and measured the model after them."""
    run = RunFolder(Path(folder))
    if (run.path / SUMMARY).is_file() and (measured(run.summary().get("rounds")) or 0) >= rounds:
        return True
    return any((measured(row.get("round")) or 0) > rounds for row in run.read_metrics())


def ended_with(folder: str | Path, *kinds: type[FedtuneError]) -> str:
    """The text of the error that the run in `folder` ended with, if it is one of `kinds`; else ""."""
    run = RunFolder(Path(folder))
    if not (run.path / ERROR).is_file():
        return ""
    error = run.read_object(ERROR)
    return for_screen(str(error.get("message"))) if error.get("type") in {kind.__name__ for kind in kinds} else ""


# ---------------------------------------------------------------------- processes


class _Office:
    """Runs cells at free places (environments), one process at each, and can end them all."""

    def __init__(self, places: Sequence[Mapping[str, str]]) -> None:
        self._free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        for place in places:
            self._free.put(place)
        self._running: set[BaseProcess] = set()
        self._closed, self._lock = Event(), Lock()

    def run(self, cell: Cell) -> Outcome:
        """Bring `cell` to its end, wait for that, and say how it was."""
        folder = Path(cell.settings.out)
        if reached(folder, cell.settings.rounds):
            problem = ended_with(folder, UnchangedError)
            return Outcome(cell, None if problem else _summary(folder), problem, again=False)
        place = self._free.get()
        try:
            code = self._process(_arguments(cell, folder), _log(folder), place)
        finally:
            self._free.put(place)
        if code:
            return Outcome(cell, None, _problem(folder, code))
        return Outcome(cell, _summary(folder))

    def close(self) -> None:
        """Start nothing any more; ask what runs to stop after the step in hand, and wait for it."""
        with self._lock:
            self._closed.set()
            running = tuple(self._running)
        for process in running:
            process.terminate()
        until = time.monotonic() + PATIENCE
        for process in running:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()

    def _process(self, arguments: Sequence[str], log: Path, place: Mapping[str, str]) -> int:
        with self._lock:
            if self._closed.is_set():
                return STOPPED
            process = _start(arguments, log, place)
            self._running.add(process)
        process.join()
        with self._lock:
            self._running.discard(process)
        return process.exitcode or 0


def _start(arguments: Sequence[str], log: Path, place: Mapping[str, str]) -> BaseProcess:
    """A new process of `fedtune` with these arguments; what it prints goes to the file `log`. Raises EngineError."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(PRELOADED)
    process: BaseProcess = context.Process(target=_child, args=(list(arguments), str(log), dict(place)))
    try:
        process.start()
    except (EOFError, OSError) as error:  # an EOFError would be taken for the end of a terminal's input, and for Ctrl-C
        raise EngineError(
            "The process from which runs are started has ended, perhaps for want of memory: use fewer --workers. "
            "What is finished is kept; the same command carries on from there."
        ) from error
    return process


def _child(arguments: list[str], log: str, place: dict[str, str]) -> None:
    """What a process does. It has no terminal: Ctrl-C there is for the one that waits, which asks this one to end."""
    os.setsid()
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    os.environ.update(place)
    with open(log, "w", encoding="utf-8", buffering=1, opener=opener) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        from fedtune.cli.main import main

        main(arguments)


def _end_with_the_caller() -> None:
    """Stop after the step in hand when the process that asked for this run is gone, also if it was killed."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _log(folder: Path) -> Path:
    """Beside the folder of a cell: what its process printed last."""
    return folder.with_name(f"{folder.name}.log")


def _arguments(cell: Cell, folder: Path) -> list[str]:
    """`fedtune simulate` for a new folder, or `--resume` for one that is there."""
    if folder.exists():
        now = cell.settings.as_mapping()
        again = [part for key in SAID_AGAIN for part in ("--set", f"{key}={toml.written(now[key])}")]
        return ["simulate", "--resume", str(folder), *again, "--quiet", "--json"]
    return ["simulate", str(_written(cell, folder)), "--out", str(folder), "--quiet", "--json"]


def _written(cell: Cell, folder: Path) -> Path:
    """The settings of the cell as a preset beside its folder."""
    path = folder.with_name(f"{folder.name}.toml")
    try:
        make_folder(path.parent, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"'{path.parent}' could not be made: {error.strerror}. Give another folder.") from error
    replace_file(path, as_toml(cell.settings, cell.name).encode())
    return path


def as_toml(settings: RunConfig, title: str = "") -> str:
    """The settings as a flat preset, without their folder."""
    kept = {key: value for key, value in settings.as_mapping().items() if key not in ("out", "resume")}
    lines = [f"{key} = {toml.written(value)}" for key, value in kept.items()]
    return "\n".join([*([toml.comment(title)] if title else []), *lines, ""])


def _summary(folder: Path) -> Mapping[str, Any]:
    """summary.json, or nothing where a longer run that was stopped has none."""
    return RunFolder(folder).summary() if (folder / SUMMARY).is_file() else {}


def _problem(folder: Path, code: int) -> str:
    """Why a process failed: what the run wrote down, or the end of what the process said."""
    if (folder / ERROR).is_file():
        return for_screen(str(RunFolder(folder).read_object(ERROR).get("message")), TAIL)
    log = _log(folder)
    said = _last_words(log).strip() if log.is_file() else ""
    return said.removeprefix("Error: ")[-TAIL:] or f"its process ended with code {code}"


def _last_words(log: Path) -> str:
    with open_regular(log, ANY) as file:
        file.seek(-min(os.fstat(file.fileno()).st_size, 4 * TAIL), os.SEEK_END)
        return file.read(4 * TAIL).decode(errors="replace")


# ---------------------------------------------------------------------- what is there


def _refuse_another(cell: Cell) -> None:
    """Raise RunFolderError if the folder of `cell` holds a run with other settings."""
    folder = Path(cell.settings.out)
    if not os.path.lexists(folder):
        return
    try:
        before = stored_settings(RunFolder.open(folder))
    except FedtuneError as error:
        raise RunFolderError(
            f"{error} It is in the way of '{cell.name}': move it, or give another folder with --out."
        ) from error
    wanted = cell.settings.as_mapping()
    free = {"out", "resume"} if before.anneal != "none" else {"out", "resume", "rounds"}
    differing = [key for key, value in before.as_mapping().items() if key not in free and value != wanted[key]]
    if differing:
        what = ", ".join(f"{key} = {before.as_mapping()[key]!r} (now {wanted[key]!r})" for key in differing)
        raise RunFolderError(
            f"The run in '{folder}' was made with {what}: give another folder with --out, or remove this one.",
            settings=tuple(differing),
        )


# ---------------------------------------------------------------------- places


def _places(cells: Sequence[Cell], workers: int) -> list[Mapping[str, str]]:
    """The environment of each process that may run at a time: a GPU each in turn where the device is CUDA."""
    device = cells[0].settings.device if cells else "cpu"
    gpus = _gpus() if device in ("auto", "cuda") else []
    alone = device not in ("auto", "cpu", "cuda")  # one named device
    count = workers or len(gpus) or (1 if alone else _cores())
    return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {} for number in range(count)]


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
