"""Only `fedtune.cli.screen` prints, and what it prints is text: no markup, no control character, whatever the terminal."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.table import Table

from fedtune.cli.screen import Screen, plain, print_json, quoted
from tests.foreign_texts import ACTING, MARKUP, TEXTS, acting

ROOT = Path(__file__).parents[2]
SCREEN = ROOT / "fedtune/cli/screen.py"
SCRIPTS = {ROOT / "client/supernode.py"}  # says one sentence of ours before Flower takes over
SOURCES = [path for package in ("fedtune", "server", "client") for path in (ROOT / package).rglob("*.py")]
OTHER_WAYS = {"print_exc", "print_exception", "echo", "secho", "from_markup", "from_ansi", "basicConfig", "Console", "Text"}


def printed_otherwise(source: str) -> Iterator[str]:
    """Every way to a terminal in `source` but a Screen."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            writes = name.startswith("sys.std") and last.startswith("write")
            if name == "print" or last in OTHER_WAYS or name.startswith("rich.") or writes:
                yield f"line {node.lineno}: {name}(...)"
            elif name == "os.write" and isinstance(node.args[0], ast.Constant):
                yield from () if _ours(node.args[1]) else [f"line {node.lineno}: os.write(...)"]
        elif isinstance(node, ast.ImportFrom) and node.module in ("rich", "rich.markup", "rich.ansi", "logging.handlers"):
            yield f"line {node.lineno}: {node.module}"


def _ours(written: ast.expr) -> bool:
    """Whether the bytes are of literals and constants only."""
    names = {node.id for node in ast.walk(written) if isinstance(node, ast.Name)}
    return all(name.isupper() for name in names)


def drawn(screen_prints: object, width: int = 200) -> str:
    """What a Screen makes of a renderable, or of a str."""
    file = io.StringIO()
    Screen(file=file, width=width, color_system=None).print(screen_prints)
    return file.getvalue()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_prints_but_the_screen(path: Path) -> None:
    found = [] if path in {SCREEN, *SCRIPTS} else list(printed_otherwise(path.read_text(encoding="utf-8")))
    if path == ROOT / "fedtune/logs.py":
        found = [way for way in found if "basicConfig" not in way]  # the one that gives its handler the formatter
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "print(name)", "Console().print(name)", "rich.print(name)", "sys.stdout.write(name)", "typer.echo(name)",
        "Text.from_markup(name)", "Text(name)", "traceback.print_exc()", "from rich import print", "os.write(2, name)",
        "logging.basicConfig()", "rich.console.Console()",
    ],
)  # fmt: skip
def test_the_check_finds_every_other_way(source: str) -> None:
    assert list(printed_otherwise(source))


@pytest.mark.parametrize("text", TEXTS)
def test_every_str_is_plain_text_wherever_it_stands(text: str) -> None:
    table = Table(title=text, caption=text)
    table.add_column(text, footer=text)
    table.add_row(text)
    for shown in (drawn(text), drawn(table), drawn(plain(text, (text, "bold")))):
        assert not list(acting(shown))
    assert not [found for found in acting(drawn(quoted(text))) if not found.startswith("INFO")]  # its lines are quoted
    if text in MARKUP and "\x1b" not in text:
        assert drawn(text) == text + "\n"
        assert text in drawn(table)


def test_nobody_turns_markup_on(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().print("[/] [red]x :bomb:", markup=True, emoji=True)
    assert capsys.readouterr().out == "[/] [red]x :bomb:\n"


def test_quoted_text_keeps_its_lines_and_tabs() -> None:
    assert drawn(quoted("one\n\ttwo\x1b")) == "one\n        two\\x1b\n"


def test_a_line_is_never_wrapped_and_a_long_one_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(width=20).say("x" * 500)
    Screen(width=20).say("x" * (1 << 24))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "x" * 500
    assert len(second) < 17_000


def test_json_is_ascii_and_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": [*TEXTS, "\ud83d", "北京"]}
    print_json(value)
    said = capsys.readouterr().out
    assert json.loads(said) == value
    assert said.isascii()
    assert not list(acting(said))


PROGRAM = """
import sys
from fedtune.cli.screen import Screen, prepare, print_json
prepare()
Screen().say("loss \\u00b1 0.5 \\u5317")
print_json("\\u5317")
Screen(stderr=True).say("\\u00e9")
"""


def outcome(**more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, encoding="ascii", timeout=60, check=True, **more
    )  # type: ignore[call-overload]


def test_a_terminal_that_lacks_a_character_gets_its_escape() -> None:
    for errors in ("", ":surrogateescape"):
        done = outcome(env={**os.environ, "PYTHONIOENCODING": f"ascii{errors}"})
        assert (done.stdout, done.stderr) == ('loss \\xb1 0.5 \\u5317\n"\\u5317"\n', "\\xe9\n")


def test_closed_streams_are_nothing_to_fail_for() -> None:
    quoted_program = PROGRAM.replace("'", "'\\''")
    for closed in (">&-", ">&- 2>&- <&-"):
        told = f"'{sys.executable}' -c '{quoted_program}' {closed}"
        subprocess.run(["sh", "-c", told], check=True, timeout=60, capture_output=True)


def test_a_file_of_the_program_never_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    program = (
        "import os; from fedtune.cli.screen import prepare; prepare(); f = open('log', 'w'); os.write(2, b'said'); f.close()"
    )
    subprocess.run(["sh", "-c", f"'{sys.executable}' -c \"{program}\" >&- 2>&- <&-"], check=True, timeout=60, cwd=tmp_path)
    assert (tmp_path / "log").read_bytes() == b""


def test_a_reader_of_errors_that_goes_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, "-c", "import fedtune.cli; fedtune.cli.main(['status', 'nowhere'])"]
    done = subprocess.run(program, stderr=write, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    if not Path("/dev/full").exists():
        return
    program = [sys.executable, "-c", "import fedtune.cli; fedtune.cli.main(['settings'])"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left" in done.stderr


def test_acting_text_is_what_these_tests_mean() -> None:
    assert len(list(acting(ACTING))) > 12
    assert not list(acting("loss 0.5\n北京"))
