"""Text that somebody else wrote (a client, a server, a file, a library), made safe where it meets a person or a disk.

    for_screen   one line without control characters, at most LONGEST_LINE long: terminals, log lines, tables, errors
    for_file     the same, without secrets, and as long as LONGEST_TEXT: ledger, log.jsonl, error.json
    client_id    an id in the one form that ids have

What a character does to a terminal or a page (colours, cursor, bells, reversed text, line breaks that look like a log line of
ours) is written as what it is, `\\x1b`. Text is cut before anything else is done with it, so that a long one costs nothing.
"""

from __future__ import annotations

import re
import unicodedata

from fedtune.errors import FedtuneError, MalformedMessageError
from fedtune.redact import redact

LONGEST_LINE = 500  # characters of foreign text on a screen
LONGEST_TEXT = 4000  # characters of foreign text in a file
LONGEST_ID = 64

_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._@-]{{0,{LONGEST_ID - 1}}}", re.ASCII)
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, invisible and reversing marks, half characters, line ends


def for_screen(text: str, most: int = LONGEST_LINE) -> str:
    """`text` as one harmless line of at most `most` characters of it. Give it to rich as `Text`, or with markup off.

    >>> for_screen("\\x1b[31mdone\\nround 9")
    '\\\\x1b[31mdone\\\\nround 9'
    """
    return _escaped(_cut(text, most))


def for_file(text: str, most: int = LONGEST_TEXT) -> str:
    """`text` as `for_screen`, and without the secrets that may stand in it (`fedtune.redact`)."""
    return _escaped(redact(_cut(text, most)))


def client_id(
    value: object,
    error: type[FedtuneError] = MalformedMessageError,
    fix: str = "change client-id in the node config (CLIENT_ID in node.env)",
) -> str:
    """`value` if it is the id of a client: 1 to LONGEST_ID letters, digits and . _ @ -, the first one a letter or digit.

    Raises:
        MalformedMessageError: it is not; `error` in its place, and another `fix`, where no message is to blame.
    """
    if not isinstance(value, str) or not _ID.fullmatch(value):
        said = f"'{for_screen(value, 40)}'" if isinstance(value, str) else type(value).__name__
        raise error(
            f"A client id is 1 to {LONGEST_ID} letters, digits or . _ @ - and begins with a letter or a digit, not {said}: "
            f"{fix}."
        )
    return value


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most} more characters)"


def _escaped(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(_harmless(character) if unicodedata.category(character) in _UNSAFE else character for character in text)


def _harmless(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
