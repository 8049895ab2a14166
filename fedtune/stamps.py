"""What names the files that something was loaded from, so that a changed file is noticed by a process that lives long."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from fedtune.errors import ConfigError
from fedtune.regular import open_regular
from fedtune.source_names import expand, split_source


def source_digest(source: str) -> bytes:
    """Names the contents of a data source; b"" for one that is not on this machine, or ships with fedtune."""
    if source in ("", "embedded"):
        return b""
    try:
        prefix, place = split_source(expand(source))
        if prefix == "hub":
            return b""
        path = Path(expand(place.partition("?")[0] if prefix else place))  # a named data set may have options
        if path.is_dir():
            return _stamp(path.rglob("*"))
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, ValueError, ConfigError):
        return b""  # whoever reads the data says what is wrong with it


def folder_stamp(folder: Path | None) -> bytes:
    """Names the files of a model's folder by size, times and place on the disk: gigabytes of weights are not read for this."""
    return _stamp(folder.iterdir() if folder else ())


def _stamp(paths: Iterable[Path]) -> bytes:
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            state = path.stat()
            seen = (str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_dev, state.st_ino)
            digest.update(repr(seen).encode())
    return digest.digest()
