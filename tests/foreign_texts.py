"""Texts as a hostile client, folder or file has them, and the question whether anything printed or written still acts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

ACTING = (
    "\x1b[2J\x1b[31mPWNED\x1b[0m"  # clear the screen, write in red
    "\x9b31m\x9d0;title\x9c"  # the same as single characters
    "\r\nINFO : round 9, 5 clients, held-out loss 0.0001\n"  # a line that we seem to have said
    "\x07\x08\x7f\x00\x85"  # bell, over the last character, line breaks of other kinds
    "\u2028\u2029\u202eback\u2066\u200f\u061c"  # reversed text
)
MARKUP = ("[/]", "[red]x", "[/x]", "[link=file:///etc/passwd]a", "<b>\x1b[5mevil", ":bomb:", "$\\frac{", "a|b")
TEXTS = (ACTING, *MARKUP)
_ACTS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def acting(text: str, layout: str = "\n") -> Iterator[str]:
    """What in `text` does something to the terminal that shows it, `layout` apart, and lines that it forges."""
    yield from {ascii(one) for one in text if unicodedata.category(one) in _ACTS and one not in layout}
    yield from re.findall(r"(?m)^INFO : round 9.*$", text)
