"""Files and JSON that somebody else may have written, read within bounds: whatever they are, reading ends and fits in memory.

A path may lead to a pipe, a device, a folder or gigabytes of nothing; a text may nest a hundred thousand brackets or hold a
number of a million digits. Nothing here runs, waits or believes a length that it has not seen.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

DEEPEST = 32  # brackets inside brackets; ours have six at most
MOST_CONTAINERS = 1_000_000  # objects and lists of one text: what a short text can make large in memory
LARGEST_NUMBER = 2**64  # whole numbers in JSON are below it in size, so that all of them fit a float
_JSON_ESCAPE_OF_HALF = (b"\\ud", b"\\uD")


class BadJsonError(ValueError):
    """A text that is not JSON within the bounds of this file; its message says why in a few words."""


@contextmanager
def opened(path: Path, *, follow: bool = True) -> Iterator[BinaryIO]:
    """The regular file at `path`, to be read; never waits for a pipe. `follow`: through a symbolic link too.

    Raises:
        OSError: there is none, or it is something else (EINVAL, with a `strerror` that says what).
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "rb") as file:
        refuse_special(os.fstat(descriptor).st_mode, path)
        yield file


def refuse_special(mode: int, path: Path) -> None:
    """Raise OSError if `mode` is not that of a regular file."""
    if not stat.S_ISREG(mode):
        what = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFLNK: "a symbolic link"}.get(
            stat.S_IFMT(mode), "a device"
        )
        raise OSError(errno.EINVAL, f"it is {what}, not a file", str(path))


def read_file(path: Path, most: int, *, follow: bool = True) -> bytes:
    """The content of the regular file at `path`, of at most `most` bytes.

    Raises:
        OSError: see `opened`; or it is larger (EINVAL, with a `strerror` that says so), and was not read then.
    """
    with opened(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= most else b""  # a buffer of the size asked for is made at once
        if size > most or len(data) > most:
            raise OSError(errno.EINVAL, f"it has {size:,} bytes, and {most:,} are the most that such a file has", str(path))
        return data


def parse_json(text: bytes | str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text in UTF-8; `object_pairs_hook` as json.loads has it.

    Raises:
        BadJsonError: it is none, is nested deeper than DEEPEST, has more than MOST_CONTAINERS objects and lists, a number that
            is not finite or not below LARGEST_NUMBER in size, or half a character.
    """
    try:
        data = text.encode() if isinstance(text, str) else text
        if data.count(b"{") + data.count(b"[") > MOST_CONTAINERS:
            raise BadJsonError(f"it has more than {MOST_CONTAINERS:,} objects and lists")
        numbers: dict[str, Any] = {"parse_int": _whole, "parse_float": _real, "parse_constant": _refuse_constant}
        value = json.loads(data.decode(), object_pairs_hook=object_pairs_hook, **numbers)
    except RecursionError:
        raise BadJsonError(f"it is nested deeper than {DEEPEST} brackets") from None
    except json.JSONDecodeError as error:
        raise BadJsonError(f"{error.msg} at character {error.pos}") from None
    except UnicodeError:
        raise BadJsonError("it is not UTF-8") from None
    _check_depth(value)
    if any(escape in data for escape in _JSON_ESCAPE_OF_HALF):
        _check_characters(value)
    return value


def _whole(digits: str) -> int:
    number = int(digits) if len(digits) <= 21 else LARGEST_NUMBER
    if abs(number) >= LARGEST_NUMBER:
        raise BadJsonError(f"a number in it has {len(digits)} digits")
    return number


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadJsonError("a number in it is too large")
    return number


def _refuse_constant(name: str) -> None:
    raise BadJsonError(f"{name} is not a number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [item for one in level for item in _inside(one) if isinstance(item, dict | list)]
        if not level:
            return
    raise BadJsonError(f"it is nested deeper than {DEEPEST} brackets")


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_characters(value: Any) -> None:
    """Half a character, which JSON can spell, cannot be written to a file or a terminal."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadJsonError("a text in it has half a character") from None
