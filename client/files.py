"""What names the files that a cache was made from, so that a changed file is noticed by a process that lives long."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedtune.config import expand, split_source
from fedtune.errors import ConfigError
from fedtune.regular import open_regular


def source_digest(source: str) -> bytes:
    """Names the contents of a data source; b"" for one that is not on this machine, or ships with fedtune."""
    prefix, path = split_source(source)
    if prefix == "hub" or source in ("", "embedded"):
        return b""
    try:
        place = Path(expand(path))
        if place.is_dir():
            return folder_stamp(place)
        with open_regular(place) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, ConfigError):
        return b""  # whoever reads the data says what is wrong with it


def folder_stamp(folder: Path | None) -> bytes:
    """Names the files of `folder` by size, time and place on the disk: gigabytes of weights are not read for this."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()) if folder else ():
        if path.is_file():
            state = path.stat()
            digest.update(repr((path.name, state.st_size, state.st_mtime_ns, state.st_ino)).encode())
    return digest.digest()
