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
    "benchmarks": {"fedtune", "client", "benchmarks"},
}
REACH = {"fedtune/cli/simulate.py": {"simulations"}, "fedtune/cli/worker.py": {"client"}}  # the composition root
GENERATED = {"client/worker_pb2.py", "client/worker_pb2_grpc.py"}
FILES = sorted(
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if path.relative_to(ROOT).as_posix() not in GENERATED
)


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


def imported_by(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Top-level packages of one statement."""
    found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return [name.split(".")[0] for name in found]


@pytest.mark.parametrize("path", FILES, ids=names)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name for name in imported(path) if name in PACKAGES}
    assert ours <= ALLOWED[package] | REACH.get(names(path), set())


def test_the_command_line_reaches_other_packages_where_a_command_needs_them_only() -> None:
    inside = [path for path in FILES if path.is_relative_to(ROOT / "fedtune")]
    reach = {names(path): set(imported(path)) & {"simulations", "client", "server"} for path in inside}
    assert {file: packages for file, packages in reach.items() if packages} == REACH


def test_the_command_line_loads_other_packages_only_when_a_command_runs() -> None:
    for file in REACH:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        at_once = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not {name for node in at_once for name in imported_by(node)} & {"simulations", "client", "server"}


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
