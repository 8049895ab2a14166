"""Somebody else's run folder: every command on it ends, runs no code, and names what is damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from limits import Told

from fedtune.run_folder import RunFolder

FILES = (
    "config.json", "versions.json", "partition.json", "metrics.jsonl", "summary.json", "status.json", "error.json",
    "generated_round_0.json", "coefficients.bin", "best_coefficients.bin", "ledger.sqlite", "ledger.lock",
)  # fmt: skip
LOOKING = (("report",), ("status",))
AT_THE_LEDGER = (("ledger", "show"), ("ledger", "show", "--json"), ("ledger", "verify"), ("status", "--json"))


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 3 << 30)


TEXTS: dict[str, bytes] = {
    "nested lists": b"[" * 100_000 + b"\n",
    "nested objects": b'{"used":' * 100_000 + b"\n",
    "deep but closed": b'{"used":' + b"[" * 900 + b"]" * 900 + b"}\n",
    "a huge number": b'{"round": 1' + b"0" * 6000 + b', "rounds": 1e999}\n',
    "not a number": b'{"round": NaN, "eval_loss": Infinity, "used": {"lr": NaN}}\n',
    "no UTF-8": b'{"used": "\xff\xfe"}\n',
    "half a character": b'{"used": {"model": "\\ud800"}, "message": "\\udfff", "error": "\\ud800", "digest": "\\ud800"}\n',
    "a list": b"[]\n",
    "a number": b"5\n",
    "nothing": b"",
    "zeros": bytes(5000),
    "other types": json.dumps({
        "used": {"rounds": [], "model": {}, "algorithm": [1]}, "clients": 5, "refused": [1], "seconds": {"a": "b", "c": 1e308},
        "round": {}, "digest": [], "texts": 5, "prompts": {}, "rounds": "x", "doing": [], "error": {}, "message": [],
        "bytes_up": 1e308, "bytes_down": 1e308, "traffic": 7, "pid": "x", "summary": [[]], "parameters": 1e308,
    }).encode() + b"\n",
    "rounds without end": b'{"round": 4611686018427387904, "clients": ["0"], "bytes_up": 18446744073709551615}\n' * 3,
}  # fmt: skip
PLACES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": lambda path: (path / "inside").mkdir(parents=True),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "3 GB of nothing": sparse,
    **{name: (lambda path, text=text: path.write_bytes(text)) for name, text in TEXTS.items()},
}


@pytest.mark.parametrize("kind", PLACES)
def test_whatever_stands_in_place_of_a_file_commands_that_look_end(
    kind: str, finished: Path, told: Told, tmp_path: Path
) -> None:
    refused = 0
    for name in FILES:
        place = Path(shutil.copytree(finished, tmp_path / f"in place of {name}"))
        (place / name).unlink(missing_ok=True)
        PLACES[kind](place / name)
        for command in (*LOOKING, *(AT_THE_LEDGER if name.startswith("ledger") else ())):
            refused += bool(told(*command, place))
    assert refused > 0


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("name", ["config.json", "coefficients.bin"])
def test_export_and_diff_name_the_damaged_file(kind: str, name: str, folder: Path, told: Told, tmp_path: Path) -> None:
    (folder / name).unlink()
    PLACES[kind](folder / name)
    for command in (("export", folder, "--format", "delta", "--out", tmp_path / "delta"), ("ledger", "diff", folder, folder)):
        said = told(*command)
        assert name in said
    assert not (tmp_path / "delta").exists()


RESUMED = {
    "metrics.jsonl": ("a pipe", "a link to a device", "3 GB of nothing", "nested lists", "other types"),
    "config.json": ("nested lists", "half a character", "other types"),
    "coefficients.bin": ("a pipe", "a folder", "3 GB of nothing"),
    "best_coefficients.bin": ("a pipe", "3 GB of nothing"),
    "ledger.sqlite": ("a pipe", "a folder", "a link to itself", "zeros"),
    "ledger.lock": ("a pipe", "a folder", "a link to itself"),
    "ledger.sqlite-journal": ("zeros",),
    "log.jsonl": ("a pipe", "a folder", "a link to itself"),
    "status.json": ("a pipe", "nested lists"),
    "control": ("a pipe", "nothing", "a link to itself"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_ends_with_the_run_or_the_name_of_what_is_damaged(name: str, folder: Path, told: Told) -> None:
    for kind in RESUMED[name]:
        place = folder / name
        before = place.read_bytes() if place.is_file() else b""
        place.unlink(missing_ok=True)
        PLACES[kind](place)
        said = told("simulate", "--resume", folder, "--quiet")
        assert not said or name in said, said
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        if before:
            place.write_bytes(before)


def test_a_resume_writes_nothing_outside_the_folder_and_removes_nothing_there(folder: Path, told: Told, tmp_path: Path) -> None:
    """Links in place of files and folders lead a run that goes on to the user's own files."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (
        "log.jsonl",
        "metrics.jsonl",
        "ledger.sqlite-wal",
        "ledger.lock",
        "1.json",
        "summary.json",
        ".status.json.tmp",
    ):
        (outside / name).write_text('{"mine": 1}\n')
    kept = {path.name: path.read_bytes() for path in outside.iterdir()}
    for name in (
        "log.jsonl",
        "metrics.jsonl",
        "ledger.sqlite-wal",
        "ledger.lock",
        "summary.json",
        ".status.json.tmp",
        "control",
    ):
        link = folder / name
        before = link.read_bytes() if link.is_file() else b""
        link.unlink(missing_ok=True)
        link.symlink_to(outside if name == "control" else outside / name)
        told("simulate", "--resume", folder, "--quiet", "--set", "rounds=3")
        assert {path.name: path.read_bytes() for path in outside.iterdir()} == kept, name
        link.unlink(missing_ok=True)
        if before:
            link.write_bytes(before)


def test_settings_in_a_folder_write_nowhere_else(folder: Path, told: Told, tmp_path: Path) -> None:
    stored = RunFolder(folder).read_object("config.json")
    stored["used"] |= {"out": str(tmp_path / "elsewhere"), "resume": str(tmp_path / "elsewhere")}
    RunFolder(folder).write_json("config.json", stored)
    for name in ("ledger.sqlite", "metrics.jsonl"):
        (folder / name).unlink()
    told("simulate", "--resume", folder, "--quiet")
    assert not (tmp_path / "elsewhere").exists()
    assert (folder / "ledger.sqlite").exists()


def test_memory_stays_bounded_where_the_files_are_huge(folder: Path) -> None:
    """Three sparse gigabytes in place of files that a report reads, and half a gigabyte more memory than the start takes."""
    for name in ("metrics.jsonl", "partition.json", "status.json", "generated_round_0.json"):
        (folder / name).unlink(missing_ok=True)
        sparse(folder / name)
    program = (
        "import resource, sys; from fedtune.cli import main; import fedtune.report.page; "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), -1)); main(['report', sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (folder / "report.html").read_text()
    assert all(name in page for name in ("metrics.jsonl", "partition.json", "generated_round_0.json"))
