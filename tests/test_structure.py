"""What holds for the source as a whole: who may import whom, what every file begins with, which files may not be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedtune", "server", "client", "simulations", "benchmarks")
ALLOWED = {
    "fedtune": {"fedtune"},
    "server": {"fedtune", "server"},
    "client": {"fedtune", "client"},
    "simulations": {"fedtune", "server", "client", "simulations"},
    "benchmarks": {"fedtune", "benchmarks"},
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that `path` imports anywhere, and those it names to importlib.import_module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{names(path)}: imports are absolute"
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value.split(".")[0] for arg in node.args if isinstance(arg, ast.Constant))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name for name in imported(path) if name in PACKAGES}
    lazily = {"simulations"} if names(path) == "fedtune/cli/simulate.py" else set()
    assert ours <= ALLOWED[package] | lazily


def test_the_command_line_reaches_the_engines_in_one_place_only() -> None:
    reach = [names(path) for path in FILES if path.is_relative_to(ROOT / "fedtune") and "simulations" in set(imported(path))]
    assert reach == ["fedtune/cli/simulate.py"]


@pytest.mark.parametrize("path", FILES, ids=names)
def test_every_file_begins_with_what_it_is_for(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc, f"{names(path)} has no docstring"
    assert len(doc.splitlines()[0]) > 10
    assert doc.splitlines()[0][0].isupper() or doc.startswith(("fedtune", "`"))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_no_file_is_called_like_a_test_or_a_drawer(path: Path) -> None:
    assert path.stem not in ("utils", "helpers", "common", "misc")
    assert not path.stem.startswith("test_")  # Flower's bundle leaves such files out
    assert not path.stem.endswith("_test")


@pytest.mark.parametrize("path", FILES, ids=names)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=names)
def test_nothing_is_left_for_later(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for mark in ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"):
        assert mark not in text


def test_python_is_what_pyproject_says() -> None:
    for path in FILES:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 11))
