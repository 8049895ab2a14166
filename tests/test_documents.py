"""Documents are held against the program: commands are parsed, presets are valid, named files and tests exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

import click
import pytest
import typer

from fedtune.cli.main import app
from fedtune.cli.presets import parse_setting
from fedtune.cli.settings import grouped
from fedtune.config import RunConfig
from fedtune.errors import ConfigError

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def spans_of(text: str) -> list[str]:
    """Everything between single backquotes, outside code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def typed_lines(text: str) -> Iterator[str]:
    """Every line of a shell block, continued lines joined, comments and redirections left out."""
    for block in blocks_of(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield re.split(r"\s[#>]", line.strip())[0].strip()


def mentioned(text: str) -> Iterator[str]:
    """Every `command ...` between backquotes; in a line of a table with the options that the line mentions."""
    for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines():
        spans = spans_of(line)
        commands = [span for span in spans if re.match(r"(fedtune|flwr|make|python) \S", span)]
        for command in commands:
            yield re.split(r"\s>", command)[0]
        if line.startswith("|") and commands:
            yield from (f"{commands[0]} {span}" for span in spans if span.startswith("--"))


def parse(command: click.Command, arguments: Sequence[str], parent: click.Context | None = None, name: str = "") -> None:
    """Parse `arguments` as the program would, and run nothing. Raises click.UsageError as it would."""
    context = command.make_context(name, list(arguments), parent=parent)
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        chosen, subcommand, left = command.resolve_command(context, rest)
        assert subcommand is not None
        parse(subcommand, left, context, chosen or "")


def check_fedtune(arguments: list[str], complete: bool) -> None:
    """Parse a fedtune command and check its settings. A mention that is not `complete` may leave the argument out."""
    program = typer.main.get_command(app)
    try:
        parse(program, arguments, name="fedtune")
    except click.MissingParameter:
        if complete:
            raise
        parse(
            program, [*arguments, "PRESET", "--out", "DIR"] if "export" in arguments else [*arguments, "PRESET"], name="fedtune"
        )
    for flag, setting in pairwise(arguments):
        if flag in ("--set", "-s") and setting.lower() != "key=value":
            RunConfig.from_mapping(dict([parse_setting(setting)]))


def check(line: str, complete: bool) -> bool:
    """Whether `line` is a command that can be checked here; raises if it is a wrong one."""
    words = shlex.split(line)
    if words[:1] == ["fedtune"]:
        check_fedtune(words[1:], complete)
    elif words[:2] == ["flwr", "run"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Flower's command line uses names that typer is about to drop
            program = typer.main.get_command(importlib.import_module("flwr.cli.app").app)
        parse(program, words[1:], name="flwr")
    elif words[:1] == ["make"]:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == []
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    else:
        return False
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documents_are_accepted(document: Path) -> None:
    """F11: the README's commands stop in argparse. All of ours are parsed by the real program, and nothing is run."""
    text = document.read_text(encoding="utf-8")
    checked = [check(line, complete=True) for line in typed_lines(text)] + [
        check(span, complete=False) for span in mentioned(text)
    ]
    if document.name == "README.md":
        assert sum(checked) > 20
    for block in blocks_of(text, "toml"):
        values = tomllib.loads(block)
        arms = values.pop("arms", {})  # of a comparison
        RunConfig.from_mapping(values)
        assert all(isinstance(arm, dict) for arm in arms.values())


def test_methods_describes_every_setting_and_choice_of_the_methods() -> None:
    """docs/methods.md names each setting of the groups that the methods use, and each of its choices, in backquotes."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    keys = [
        key
        for title in ("Method", "Zeroth order", "Ferret and first order", "Comparison", "Directions", "Messages")
        for key in grouped()[title]
    ]
    choices = [str(choice) for key in keys for choice in get_args(RunConfig.model_fields[key].annotation)]
    assert len(keys) > 20
    named = set(re.findall(r"[\w-]+", " ".join(spans_of(text))))
    assert [name for name in (*keys, *choices) if name and name not in named and not name.isdigit()] == []


@pytest.mark.parametrize(
    ("line", "error", "text"),
    [
        ("fedtune simulate x --use_prompts", click.UsageError, "No such option"),
        ("fedtune simulate", click.UsageError, "Give a preset"),
        ("fedtune trian x", click.UsageError, "No such command"),
        ("fedtune simulate x --set Kk=3", ConfigError, "no setting 'Kk'"),
        ("make dmeo", AssertionError, "dmeo"),
    ],
)
def test_a_wrong_command_would_be_found(line: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as found:
        check(line, complete=True)
    said = found.value.format_message() if isinstance(found.value, click.UsageError) else str(found.value)
    assert text in said


def named_tests(text: str) -> list[tuple[str, str]]:
    """(file, function) of every tests/...py::name in `text`."""
    return re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    "source",
    [
        "tests/fidelity/test_defects_of_others.py",
        "tests/fidelity/test_paper_statements.py",
        "docs/claims.md",
        "docs/ledger.md",
        "docs/methods.md",
        "docs/worker.md",
    ],
)
def test_every_test_named_here_exists(source: str) -> None:
    """And every file that the documents name in backquotes or links."""
    text = (ROOT / source).read_text(encoding="utf-8")
    named = named_tests(text)
    assert len(named) > 5
    for file, function in named:
        assert function in functions_of(ROOT / file), f"{source} names {file}::{function}"
    if source.endswith(".md"):
        spans = "\n".join(spans_of(text))
        paths = re.findall(r"^((?:fedtune|server|client|tests|simulations|docs)/[\w./-]+)", spans, flags=re.MULTILINE)
        paths += [f"docs/{link}" for link in re.findall(r"\]\(([\w-]+\.md)\)", text)]
        assert paths
        assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_test_named_in_the_guide_to_deployments_exists() -> None:
    """Its paths are not looked at: most are of a deployment's folder."""
    named = named_tests((ROOT / "docs" / "deployment.md").read_text(encoding="utf-8"))
    assert len(named) > 5
    assert [name for name in named if name[1] not in functions_of(ROOT / name[0])] == []


def test_every_row_of_a_table_of_faults_names_its_test() -> None:
    """fault, what happens, test: no row without one."""
    for name in ("ledger.md", "worker.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        table = text.partition("## Faults")[2].partition("\n## ")[0]
        rows = [line for line in table.splitlines() if line.startswith("|")][2:]
        assert len(rows) > 10
        assert [row for row in rows if not named_tests(row)] == []
