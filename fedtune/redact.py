"""Texts without the secrets that may stand in them: what a client or a library says ends up in logs and in the ledger.

Texts come from strangers, so every pattern takes a time in proportion to the length of the text, whatever stands in it: what
a pattern has read it either hides or passes over, and it never reads the same stretch from another start again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

HIDDEN = "***"
SHORTEST = 8  # shorter values are words that occur by chance

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH)_?KEY", re.IGNORECASE)


def _whole_token(found: re.Match[str]) -> str:
    """A JSON web token has three parts; a first part alone is passed over, or each place in it would be tried as a start."""
    return HIDDEN if found["rest"] else found[0]


_PATTERNS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (  # what is found, what is left of it
    (re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
    (re.compile(r"\b(?:hf|sk|ghp|gho|glpat|xox[bap])[_-][A-Za-z0-9_-]{16,}+"), HIDDEN),
    (re.compile(r"\beyJ[\w-]++(?P<rest>\.[\w-]++\.[\w-]++)?"), _whole_token),
    (re.compile(r"(://)[^/\s:@]*+:[^/\s]+@"), rf"\1{HIDDEN}@"),  # name:password@ in an address
    (re.compile(r"(bearer )[\w.~+/=-]{8,}+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"((?:token|secret|password)[=:])\S{4,}+", re.IGNORECASE), rf"\1{HIDDEN}"),
)


def redact(text: str) -> str:
    """`text` with "***" for keys, tokens, passwords and the values of environment variables that are called like them.

    >>> redact("GET https://anna:geheim@host/x with hf_abcdefghijklmnopqrstuv")
    'GET https://***@host/x with ***'
    """
    values = {value for name, value in os.environ.items() if len(value) >= SHORTEST and _SECRET_NAME.search(name)}
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, HIDDEN)
    for pattern, left in _PATTERNS:
        text = pattern.sub(left, text)
    return text
