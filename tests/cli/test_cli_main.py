"""Every way to fail is one sentence with the fix and an exit code; a traceback comes only when asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from playback import Outcome

import fedtune as package
from fedtune.cli import simulate as command
from fedtune.errors import DataError, EngineError

COMMANDS = ["simulate", "demo", "presets", "data", "estimate", "export", "settings", "worker"]


def _raise(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(command, "runner", run)


def test_version(fedtune: Callable[..., Outcome]) -> None:
    assert fedtune("--version").out == f"fedtune {package.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(fedtune: Callable[..., Outcome], name: str) -> None:
    assert name in fedtune("--help").out
    outcome = fedtune(name, "--help")
    assert outcome.code == 0
    assert f"Usage: fedtune {name}" in outcome.out


@pytest.mark.parametrize("arguments", [(), ("data",)])
def test_no_command_shows_the_help(fedtune: Callable[..., Outcome], arguments: tuple[str, ...]) -> None:
    outcome = fedtune(*arguments)
    assert outcome.code == 2
    assert "Commands" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bogus",), "No such command 'bogus'. `fedtune --help` explains the command."),
        (
            ("simulate",),
            "Missing argument PRESET. Give a preset, or --resume RUN. `fedtune simulate --help` explains the command.",
        ),
        (("simulate", "x", "--bogus"), "No such option '--bogus'."),
        (("simulate", "x", "--workers", "-1"), "Invalid value for '--workers': -1 is not in the range x>=0."),
        (("simulate", "x", "--set", "y"), "Invalid value: --set takes KEY=VALUE, not 'y'."),
        (("export", "x"), "Missing option '--out'."),
    ],
)
def test_mistyped(fedtune: Callable[..., Outcome], arguments: tuple[str, ...], message: str) -> None:
    outcome = fedtune(*arguments)
    assert outcome.code == 2
    assert outcome.err.startswith(f"Error: {message}")
    assert outcome.err.count("\n") == 1


def test_a_known_error_is_its_sentence(
    fedtune: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, preset: object
) -> None:
    _raise(monkeypatch, DataError("The file [x] has no rows: give another."))
    outcome = fedtune("simulate", "small.toml", "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (1, "", "Error: The file [x] has no rows: give another.\n")


def test_ctrl_c_is_130_and_one_line(fedtune: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, preset: object) -> None:
    _raise(monkeypatch, KeyboardInterrupt())
    outcome = fedtune("simulate", "small.toml", "--quiet")
    assert outcome.code == 130
    assert outcome.err == "Stopped at once; the round in hand is lost, those before are in the run folder.\n"


def test_the_last_lines_of_a_failed_process_come_with_debug(
    fedtune: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, preset: object
) -> None:
    _raise(monkeypatch, EngineError("Flower ended the run as failed", tail=["line one", "line two"]))
    outcome = fedtune("simulate", "small.toml", "--quiet")
    assert outcome.err == "Error: Flower ended the run as failed. --debug shows its last lines.\n"
    assert "line one\nline two\n" in fedtune("simulate", "small.toml", "--quiet", "--debug").err


def test_an_unexpected_error_has_a_traceback_only_with_debug(
    fedtune: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, preset: object
) -> None:
    _raise(monkeypatch, ZeroDivisionError("division by zero"))
    outcome = fedtune("simulate", "small.toml", "--quiet")
    assert outcome.code == 1
    assert outcome.err == (
        "Error: Unexpected ZeroDivisionError: division by zero. Run it again with --debug for the traceback.\n"
    )
    assert "Traceback" in fedtune("simulate", "small.toml", "--quiet", "--debug").err
    assert "Traceback" in fedtune("--debug", "simulate", "small.toml", "--quiet").err


def test_help_is_quick_to_import() -> None:
    code = (
        "import sys; import fedtune.cli; heavy = {'torch', 'transformers', 'flwr', 'numba'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    program = [sys.executable, "-c", "import fedtune.cli; fedtune.cli.main(['settings'])"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""
