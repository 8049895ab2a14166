"""Texts without the secrets that may stand in them: what a client or a library says ends up in logs and in the ledger."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
SHORTEST = 8  # shorter values are words that occur by chance

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH)_?KEY", re.IGNORECASE)
_PATTERNS = (  # what is found, and what is kept of it
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
    (re.compile(r"\b(?:hf|sk|ghp|gho|glpat|xox[bap])[_-][A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]+"), HIDDEN),  # a JSON web token
    (re.compile(r"(://)[^/\s:@]+:[^/\s@]+@"), rf"\1{HIDDEN}@"),  # name:password@ in an address
    (re.compile(r"(bearer )[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"((?:token|secret|password)[=:])\S{4,}", re.IGNORECASE), rf"\1{HIDDEN}"),
)


def redact(text: str) -> str:
    """`text` with "***" for keys, tokens, passwords and the values of environment variables that are called like them.

    >>> redact("GET https://anna:geheim@host/x with hf_abcdefghijklmnopqrstuv")
    'GET https://***@host/x with ***'
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    for pattern, kept in _PATTERNS:
        text = pattern.sub(kept, text)
    return text
