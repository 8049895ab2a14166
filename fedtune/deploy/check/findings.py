"""What a check found: good, worth knowing, or wrong; what is wrong always comes with what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a check came out."""

    ok = "ok"
    warning = "warning"
    problem = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of `fedtune deploy check`.

    Attributes:
        check: what was looked at, in one word or two.
        state: how it came out; any problem makes the command exit with 1.
        text: what was expected and what was found.
        fix: what to do; empty only if nothing has to be done.
        role: 'server' or the name of the node.
    """

    check: str
    state: State
    text: str
    fix: str = ""
    role: str = ""


def good(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, State.ok, text)


def warn(check: str, text: str, fix: str) -> Finding:
    """It works now, but look at it."""
    return Finding(check, State.warning, text, fix)


def wrong(check: str, text: str, fix: str) -> Finding:
    """It will not work, or is not safe."""
    return Finding(check, State.problem, text, fix)
