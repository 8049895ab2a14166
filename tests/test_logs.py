"""The log of processes: a message is one line without secrets, and a traceback has no line that looks like a message."""

from __future__ import annotations

import io
import logging

import pytest

from client.messages import error_of, problem_of
from fedtune.errors import DataError
from fedtune.logs import FORMAT, OneLine, tame
from tests.foreign_texts import ACTING, TEXTS, acting


def logged(text: str) -> list[str]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine(FORMAT))
    log = logging.Logger("fedtune.test")
    log.addHandler(handler)
    log.info("%s: done", text)
    try:
        raise ValueError(f"token=geheim99 {text}")
    except ValueError:
        log.exception("%s failed", text)
    return stream.getvalue().split("\n")[:-1]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_nobody_forges_a_line_of_the_log(text: str) -> None:
    lines = logged(text)
    assert not [line for line in lines if list(acting(line, ""))]
    assert " INFO " in lines[0]
    assert " ERROR " in lines[1]
    assert lines[2].strip() == "Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in lines[2:])
    assert not any("geheim99" in line for line in lines)


def test_a_problem_leaves_the_node_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    error = error_of(problem_of(DataError("cannot read with correct-horse-battery\n" + "x" * 100_000)))
    assert type(error) is DataError
    assert str(error).startswith("cannot read with ***\\n")
    assert len(str(error)) < 5000


def test_a_process_without_a_log_warns_in_harmless_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "lastResort", logging._StderrHandler(logging.WARNING))  # type: ignore[attr-defined]
    tame()
    logging.Logger("fedtune.test").warning("%s", ACTING)
    printed = capsys.readouterr().err
    assert "PWNED" in printed
    assert not list(acting(printed))
