"""Python's log as text: a line a message, whatever stands in it.

Settings, names and errors in it come from servers, files and libraries. A message stays one line without secrets; the lines
of a traceback are indented, so that none of them looks like a message.
"""

from __future__ import annotations

import logging
import sys
import textwrap
from types import TracebackType

from fedtune.foreign import for_file, for_reading
from fedtune.redact import redact

LONGEST_TRACEBACK = 20_000  # characters, the last ones
FORMAT = "%(asctime)s %(levelname)s %(message)s"

_Raised = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class OneLine(logging.Formatter):
    """A format of logging, with `fedtune.foreign` on what it is filled with."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """The line of a message."""
        record.message = for_file(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: _Raised) -> str:  # noqa: N802
        """The lines below it, of an error with a traceback."""
        text = for_reading(redact(super().formatException(ei)[-LONGEST_TRACEBACK:]), LONGEST_TRACEBACK)
        return textwrap.indent(text, "    ", predicate=lambda line: True)


def begin() -> None:
    """Log to stderr, which is a file where a worker runs in the background."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def tame() -> None:
    """In a process that logs nothing by itself, have warnings and errors on stderr in this form too."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(OneLine())
