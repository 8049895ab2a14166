"""The folder of one run: what it holds, written so that a crash, a full disk or a NaN never leaves a file that lies.

    config.json        {"asked": preset and overrides as given, "used": every setting of the run}
    versions.json      versions of fedtune, Python and the libraries that results depend on
    partition.json     which rows each client got
    metrics.jsonl      one JSON object a round, round 0 is the base model; a number that is not finite is null
    summary.json       the end of the run: before and after, bytes, digest
    coefficients.bin   the tuned model as coefficients over the base model; best_coefficients.bin: of the lowest loss
    error.json         why a run failed
    ledger.sqlite      the truth about the run (fedtune/ledger.py); a resume makes the files above from it again
    values/            what is too large for a row of the ledger

The folder is of mode 700 and its files of 600, since they hold the ledger and held-out rows; a folder that somebody opened to
others stays open. Whole files appear atomically (temporary file, fsync, rename). metrics.jsonl grows by one flushed line at a
time; a last line that a crash tore is ignored when read and cut off by the next append.

Anybody may have made the folder that is read: see `fedtune.bounded`. What is written stays in the folder, also where somebody
put a symbolic link in place of a file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from fedtune import shortage
from fedtune.bounded import BadJsonError, parse_json
from fedtune.config import RunConfig
from fedtune.errors import ConfigError, RunFolderError
from fedtune.foreign import for_json
from fedtune.pieces import Buffer
from fedtune.private import make_folder, opener
from fedtune.regular import ANY, open_regular, own_descriptor, read_regular

CONFIG = "config.json"
VERSIONS = "versions.json"
PARTITION = "partition.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
COEFFICIENTS = "coefficients.bin"
BEST = "best_coefficients.bin"

MOST_BYTES = 1 << 30  # of a file of the folder
MOST_JSON = 1 << 25  # of a JSON file: partition.json of two million rows
MOST_METRICS, LONGEST_LINE, MOST_LINES = 1 << 28, 1 << 24, 1_000_001  # bytes, bytes, and rounds with round 0

_LIBRARIES = ("fedtune", "torch", "transformers", "tokenizers", "flwr", "numpy", "numba", "safetensors")


@dataclass(frozen=True)
class RunFolder:
    """An existing run folder. Make one with `RunFolder.create`, read one with `RunFolder.open`."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, asked: Mapping[str, Any], config: RunConfig) -> Self:
        """Make the folder (parents too) with config.json and versions.json; it appears whole or not at all.

        Raises:
            RunFolderError: the folder exists already, or cannot be made.
        """
        folder = Path(path)
        check_new(folder)
        with _explained(folder, "made"):
            make_folder(folder.parent, exist_ok=True)
            new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
            shutil.rmtree(new, ignore_errors=True)
            make_folder(new)
            try:
                run = cls(new)
                run.write_json(VERSIONS, versions())
                run.write_json(CONFIG, {"asked": dict(asked), "used": config.as_mapping()})
                check_new(folder)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
            _sync_folder(folder.parent)
        return cls(folder)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run folder at `path`. Raises RunFolderError if it is missing or is not a run folder."""
        folder = Path(path)
        if not os.path.isdir(folder):  # False, too, for a path that no system can have
            raise RunFolderError(f"There is no run folder '{folder}': give the folder that `fedtune simulate` printed.")
        if not os.path.isfile(folder / CONFIG):
            raise RunFolderError(f"'{folder}' is not a run folder: it has no {CONFIG}. Give the folder of a run.")
        return cls(folder)

    # ------------------------------------------------------------------ writing

    def write_json(self, name: str, obj: Any, *, null_for_nan: bool = False) -> None:
        """Write `obj` as `name`, atomically. Tuples become lists, numpy and torch values numbers and paths text.

        Raises:
            RunFolderError: a number is not finite (and `null_for_nan` is false), `obj` is not JSON, or the disk refuses.
        """
        self.write_bytes(name, _encode(name, obj, null_for_nan, indent=2))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write `data` as `name`, atomically: a reader sees the old file or the new one, also after a power cut."""
        self.write_parts(name, [data])

    def write_parts(self, name: str, parts: Iterable[Buffer]) -> None:
        """`write_bytes` of parts that follow each other."""
        replace_with(self._file(name), parts)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append `row` to metrics.jsonl, flushed to the disk; a number that is not finite is written as null."""
        target = self._file(METRICS)
        line = _encode(METRICS, row, null_for_nan=True, indent=None)
        with _explained(target, "written"):
            _cut_torn_line(target)
            with os.fdopen(appending(target), "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl anew, atomically."""
        self.write_bytes(METRICS, b"".join(_encode(METRICS, row, null_for_nan=True, indent=None) for row in rows))

    def discard(self, name: str) -> None:
        """Remove the file `name` if it is there."""
        target = self._file(name)
        with _explained(target, "removed"):
            target.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove temporary files that a killed process left."""
        for leftover in self.path.glob(".*.tmp"):
            if leftover.is_symlink() or not leftover.is_dir():
                with _explained(leftover, "removed"):
                    leftover.unlink(missing_ok=True)

    # ------------------------------------------------------------------ reading

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl in order, [] before the first. A torn last line is left out.

        Raises:
            RunFolderError: a line that is not the last is damaged, or no object, or the file cannot be that of a run.
        """
        target = self._file(METRICS)
        if not os.path.lexists(target):
            return []
        rows: list[dict[str, Any]] = []
        with _explained(target, "read"), open_regular(target, ANY) as file:
            if os.fstat(file.fileno()).st_size > MOST_METRICS:
                raise RunFolderError(f"'{target}' has more than {MOST_METRICS:,} bytes: it is not of a run. Restore it.")
            while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):  # what follows the last newline was never finished
                rows.append(_metrics_row(line, target, len(rows) + 1))
            if len(line) == LONGEST_LINE:
                raise RunFolderError(f"Line {len(rows) + 1} of '{target}' is too long for a round: restore the file.")
        return rows

    def read_json(self, name: str) -> Any:
        """The content of the JSON file `name`. Raises RunFolderError if it is missing or damaged."""
        try:
            return parse_json(self.read_bytes(name, MOST_JSON))
        except BadJsonError as error:
            raise RunFolderError(
                f"'{self.path / name}' is damaged, not JSON ({error}): restore it from a copy.", name=name
            ) from None

    def read_object(self, name: str) -> dict[str, Any]:
        """The JSON object in the file `name`. Raises RunFolderError if it is missing, damaged or no object."""
        found = self.read_json(name)
        if not isinstance(found, dict):
            raise RunFolderError(f"'{self.path / name}' is damaged, it holds no object: restore it from a copy.", name=name)
        return found

    def read_bytes(self, name: str, most: int = MOST_BYTES) -> bytes:
        """The content of the file `name`, of at most so many bytes. Raises RunFolderError if it is missing or no such file."""
        with self._reading(name) as target:
            return read_regular(target, most)

    def mapped(self, name: str) -> Buffer:
        """The content of the file `name`, of any size, mapped into memory. Raises RunFolderError like `read_bytes`."""
        with self._reading(name) as target, open_regular(target, ANY) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        target = self._file(name)
        with _explained(target, "read"):
            try:
                yield target
            except FileNotFoundError:
                raise RunFolderError(
                    f"Run folder '{self.path}' has no {name}: the run stopped before it was written, so run it again.",
                    name=name,
                ) from None

    def config(self) -> RunConfig:
        """The settings that the run used. Raises RunFolderError if config.json has none, or others than this program's."""
        used = self.read_object(CONFIG).get("used")
        if not isinstance(used, dict):
            raise RunFolderError(f"'{self.path / CONFIG}' has no settings under 'used': '{self.path}' is not a run folder.")
        try:
            return RunConfig.from_mapping(used)
        except ConfigError as error:
            raise RunFolderError(
                f"The settings in '{self.path / CONFIG}' are not those of a run of this program ({error}) Restore the file, "
                "or use the fedtune that made the run (versions.json).",
                name=CONFIG,
            ) from None

    def summary(self) -> dict[str, Any]:
        """summary.json. Raises RunFolderError if the run did not finish."""
        return self.read_object(SUMMARY)

    def _file(self, name: str) -> Path:
        if not name or Path(name).name != name:
            raise RunFolderError(f"'{name}' is not a plain file name: files of a run lie directly in its folder.", name=name)
        return self.path / name


def replace_file(target: Path, data: bytes) -> None:
    """Write `data` at `target`, atomically (`replace_with`)."""
    replace_with(target, [data])


def replace_with(target: Path, parts: Iterable[Buffer]) -> None:
    """Write `parts` at `target`, atomically: a reader sees the old file or the new one, also after a power cut.

    In a folder of its owner alone the file is so too (`fedtune.private`).

    Raises:
        RunFolderError: the disk refuses; says what to do.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _explained(target, "written"):
        try:
            temporary.unlink(missing_ok=True)  # whatever it is, and wherever a link leads
            with open(temporary, "xb", opener=opener) as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def appending(target: Path) -> int:
    """A descriptor that appends to the regular file `target`, which is made if it is not there; never through a link.

    Raises:
        RunFolderError: something else is there, or the disk refuses.
    """
    with _explained(target, "written"):
        return own_descriptor(target, os.O_RDWR | os.O_APPEND | os.O_CREAT, opener)


def dated(label: str) -> str:
    """The default place of a run: runs/LABEL-DATE-TIME."""
    return f"runs/{label}-{datetime.now():%Y%m%d-%H%M%S}"


def check_new(path: str | Path) -> None:
    """Raise RunFolderError if there is anything at `path`, so that a run can refuse before it loads a model."""
    if os.path.lexists(path):
        raise _exists(Path(path))


def versions() -> dict[str, str]:
    """Versions of fedtune, Python and the libraries that results depend on, and the machine's kind."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def _exists(folder: Path) -> RunFolderError:
    return RunFolderError(f"'{folder}' exists already: give another folder with --out, or remove it.", path=str(folder))


@contextmanager
def _explained(target: Path, verb: str) -> Iterator[None]:
    """Turn an error of the operating system at `target` into one that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if short := shortage.disk(error):
            text = f"'{target}' could not be {verb}: {short}. Free some space or give a folder elsewhere with --out."
        elif verb == "read":
            text = f"'{target}' could not be read: {reason}. Restore it from a copy, or check its permissions."
        else:
            text = f"'{target}' could not be {verb}: {reason}. Check its permissions, or give another folder with --out."
        raise RunFolderError(text, path=str(target), errno=error.errno) from error


def _encode(name: str, obj: Any, null_for_nan: bool, indent: int | None) -> bytes:
    """`obj` as JSON and a newline, harmless on the terminal that shows it. Raises RunFolderError for what JSON cannot hold."""
    try:
        text = json.dumps(_plain(obj, null_for_nan), indent=indent, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{name} was not written: {error}. Nothing in the run folder changed.", name=name) from None
    return (for_json(text) + "\n").encode()


def _plain(value: Any, null_for_nan: bool) -> Any:
    """`value` in the types of JSON. Raises ValueError for a number that is not finite, TypeError for other types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, null_for_nan) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, null_for_nan) for item in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str | int | float | None) and hasattr(value, "tolist"):
        return _plain(value.tolist(), null_for_nan)
    if isinstance(value, float) and not math.isfinite(value):
        if null_for_nan:
            return None
        raise ValueError(f"it holds a number that is not finite ({value})")
    return value


def _metrics_row(line: bytes, target: Path, number: int) -> dict[str, Any]:
    try:
        if number > MOST_LINES:
            raise BadJsonError("there are too many")
        row = parse_json(line)
    except BadJsonError:
        row = None
    if not isinstance(row, dict):
        raise RunFolderError(f"Line {number} of '{target}' is damaged: restore the file or delete the line.")
    return row


def _cut_torn_line(target: Path) -> None:
    """Cut off what follows the last newline of `target`: a line that a crash left unfinished."""
    with os.fdopen(appending(target), "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = max(0, end - LONGEST_LINE)
        file.seek(start)
        whole = start + file.read().rfind(b"\n") + 1
        if whole != end:
            file.truncate(whole)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system lets folders be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
