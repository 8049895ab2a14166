"""The one way to the operator's terminal: what is printed is text, never markup, and does nothing to the terminal.

Commands print through a `Screen`, make styled text with `plain` and JSON with `print_json`. Client ids, error texts, rows of
data and cells of a stranger's ledger need no care where they are printed; a test reads the sources of this package and
refuses every other way to print.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from fedtune.foreign import for_reading, for_screen
from fedtune.logs import tame

LONGEST = 16_000  # characters of a line, which may hold several foreign texts


class Screen(Console):
    """rich's Console, in which every str is one plain line, wherever it stands: printed, in a table, or above one.

    Args:
        stderr: print there, and leave stdout to a result that a program reads.
    """

    def __init__(self, *, stderr: bool = False, **more: Any) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, **more)

    def render_str(self, text: str, **more: Any) -> Text:
        """What rich makes of a str: here, the text as it is, in which nothing is markup and nothing acts."""
        return super().render_str(for_screen(text, LONGEST), **{**more, "markup": False, "emoji": False, "highlight": False})

    def say(self, line: str, style: str = "") -> None:
        """Print one line, which goes on beyond the terminal's width."""
        self.print(plain(line, style=style), soft_wrap=True)

    def page(self, text: str) -> None:
        """Print a text with its line breaks, as long as it is; it ends with one."""
        self.print(quoted(text.removesuffix("\n")), soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Whoever read has gone, and so has its interest: end without a word."""
        self.quiet = True
        let_go()
        raise SystemExit(1)


def plain(*pieces: str | tuple[str, str], style: str = "") -> Text:
    """One line of text; a piece may have a style of its own."""
    texts = [(piece, "") if isinstance(piece, str) else piece for piece in pieces]
    return Text.assemble(*((for_screen(text, LONGEST), of) for text, of in texts), style=style)


def quoted(text: str, style: str = "") -> Text:
    """Text with its line breaks, as long as it is: samples of data, tracebacks, and headings of ours in two lines."""
    return Text(for_reading(text, len(text)), style=style)


def print_json(value: object, *, indent: int | None = None) -> None:
    """Print `value` on stdout as JSON in ASCII: one line, or a tree with `indent`."""
    print(json.dumps(value, indent=indent))  # which escapes all that is not ASCII, DEL too


def prepare() -> None:
    """Make the standard streams take everything: open where the caller closed them, and with escapes for what their
    encoding lacks. A file that the program opens must not get the number of a closed one, or messages would land in it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for as long as the process lives)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    tame()


def let_go() -> None:
    """Give up streams whose reader has gone, so that the end of the process does not fail on what they still hold."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
