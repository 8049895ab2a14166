"""Which sources a process runs, so that a ClientApp never works with a worker of other code."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import fedtune

ROOT = Path(__file__).parents[1]


@cache
def code_version() -> str:
    """The version of fedtune and 12 hexadecimal digits of a digest over the sources of fedtune/ and client/.

    Read once a process, early: what is imported later from sources that were changed meanwhile has another version.
    """
    digest = hashlib.sha256()
    for package in ("client", "fedtune"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return f"{fedtune.__version__}+{digest.hexdigest()[:12]}"
