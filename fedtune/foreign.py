"""Text that somebody else wrote (a client, a server, a file, a library), made safe where it meets a person or a disk.

    for_screen    one line without control characters, at most LONGEST_LINE long: terminals, log lines, tables, errors
    for_reading   the same with its line breaks and tabs: prompts, responses, tracebacks
    for_file      one line without secrets too, and as long as LONGEST_TEXT: ledger, log.jsonl, error.json
    for_json      the text of a JSON document, which keeps its value
    client_id     an id in the one form that ids have

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

_MARGIN = 4096  # characters that are looked at beyond those that are kept: a secret that is cut in two is not found
_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._@-]{{0,{LONGEST_ID - 1}}}", re.ASCII)
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, invisible and reversing marks, half characters, line ends
_LAYOUT = "\n\t\u200c\u200d"  # of text that is read: line breaks, tabs, and the joiners that Persian or Hindi is spelled with
_UNUSUAL = re.compile("[^ -~]+")


def for_screen(text: str, most: int = LONGEST_LINE) -> str:
    """`text` as one harmless line of at most `most` characters of it. Give it to rich as `Text`, or with markup off.

    >>> for_screen("\\x1b[31mdone\\nround 9")
    '\\\\x1b[31mdone\\\\nround 9'
    """
    return _escaped(_cut(text, most))


def for_reading(text: str, most: int = LONGEST_TEXT) -> str:
    """`text` as `for_screen`, but with its line breaks and tabs: for places where the layout shows that it is quoted.

    >>> for_reading("one\\ntwo\\r\\x07")
    'one\\ntwo\\\\r\\\\x07'
    """
    return _escaped(_cut(text, most), _LAYOUT)


def for_file(text: str, most: int = LONGEST_TEXT) -> str:
    """`text` as `for_screen`, and without the secrets that may stand in it (`fedtune.redact`)."""
    seen = text[: most + _MARGIN]
    hidden = redact(seen)
    end = len(hidden) if len(seen) == len(text) else max(0, len(hidden) - _MARGIN)
    kept = hidden[: min(most, end)]
    return _escaped(_with_rest(kept, len(hidden) - len(kept) + len(text) - len(seen)))


def for_json(document: str) -> str:
    """A JSON document with what `for_screen` escapes spelled as JSON's own escapes: the same value, and a harmless file.

    >>> for_json('{"é": "\\x9b1m"}')
    '{"é": "\\\\u009b1m"}'
    """
    return _UNUSUAL.sub(lambda found: "".join(map(_in_json, found[0])), document)


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
    return _with_rest(text[:most], len(text) - most)


def _with_rest(kept: str, left_out: int) -> str:
    return f"{kept} ... ({left_out} more characters)" if left_out > 0 else kept


def _escaped(text: str, layout: str = "") -> str:
    return _UNUSUAL.sub(lambda found: "".join(one if one in layout else _harmless(one) for one in found[0]), text)


def _acts(character: str) -> bool:
    """Whether it does something, or is none of the characters that a text may have (U+FFFE, U+FFFF)."""
    return unicodedata.category(character) in _UNSAFE or ord(character) & 0xFFFE == 0xFFFE


def _harmless(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii") if _acts(character) else character


def _in_json(character: str) -> str:
    """Between its strings JSON has no unusual character but the line breaks of its layout."""
    if character == "\n" or not _acts(character):
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[n : n + 2].hex()}" for n in range(0, len(units), 2))
