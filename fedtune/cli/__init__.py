"""The command line: one module a command, and `main`, which turns every error into one sentence and an exit code."""

from fedtune.cli.main import main

__all__ = ["main"]
