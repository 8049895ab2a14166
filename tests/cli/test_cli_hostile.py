"""What strangers wrote, shown by every command: as text, on its own lines, with exit code 0 or one sentence."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from playback import Outcome, metrics

from fedtune.cli.compare_tables import results_sheet
from fedtune.cli.lines import LineLog
from fedtune.cli.live import LiveRun
from fedtune.cli.screen import Screen
from fedtune.cli.tables import comparison_table, result_table
from fedtune.cli.view import RunView
from fedtune.cli.watch import watching
from fedtune.config import RunConfig
from fedtune.delta import encode
from fedtune.errors import DataError, EngineError, FedtuneError
from fedtune.experiments.compare import Result
from fedtune.ledger import Header, Ledger, Round, Snapshot, Used
from fedtune.progress import ClientFinished, ClientStep, EvaluationStep, Event, Note, RoundStarted, RunStarted, emit
from fedtune.run_folder import RunFolder
from fedtune.traffic import Traffic
from simulations.engines.flower_app import config_lines
from tests.foreign_texts import ACTING, MARKUP, TEXTS, acting
from tests.test_delta import tiny

Fedtune = Callable[..., Outcome]


def stranger(path: Path, text: str) -> Path:
    """The folder of a run as somebody else may have made it, with `text` wherever a text may stand."""
    config = RunConfig.from_mapping({"out": str(path), "rounds": 2})
    folder = RunFolder.create(path, {text: text}, config)
    used = {**config.as_mapping(), "model": text, "data": text, text: text}
    folder.write_json("config.json", {"asked": {text: text}, "used": used})
    folder.write_json("versions.json", {text: text, "torch": text})
    folder.write_json("partition.json", {"clients": [[1], [2]], "categories": {text: 3}})
    folder.write_json("error.json", {"type": text, "message": text})
    folder.write_json("status.json", {"doing": "failed", "error": text, "pid": text, "host": text, "at": text})
    for number in (0, 1):
        folder.write_json(f"generated_round_{number}.json", {"texts": [text], "prompts": [text], "references": [text]})
    row = {**metrics(1, (text, "1"), {"1": text}), "seconds": {text: 1.0}, "digest": text}
    folder.write_metrics([metrics(0, ()), row])
    header = Header(text, {text: text}, {}, used, b"f" * 16, b"l" * 16, ((text, (2,)),), b"p" * 32, b"d" * 8)
    with Ledger.create(path, header, Snapshot(0, 0, b""), Round(0, state=b"s" * 16)) as ledger:
        costs = {"traffic": {text: Traffic(payload_up=3)}, "seconds": {text: 1.0}, "state": b"t" * 16}
        rounds = Round(1, clients=(text, "1"), refused={"1": text}, train_loss=1.0, **costs)
        ledger.commit_round(rounds, [Used(text, 1.0, b"")], [], Snapshot(1, 1, b""))
        ledger.commit_event("drop", {"client": text})
        ledger.commit_event("command", {"name": text, "refused": text})
        ledger.commit_event(text, {text: [text]})
    return path


READ = (
    ("ledger", "show", "RUN"),
    ("ledger", "show", "RUN", "--json"),
    ("status", "RUN"),
    ("status", "RUN", "--json"),
    ("report", "RUN", "--out", "page.html"),
    ("report", "RUN", "RUN", "--out", "page.html"),
    ("delta", "show", "x.safetensors"),
    ("delta", "show", "x.safetensors", "--json"),
    ("ledger", "diff", "x.safetensors", "x.safetensors"),
)
REFUSED = (
    ("ledger", "verify", "RUN"),
    ("export", "RUN", "--out", "TEXT"),
    ("drop", "RUN", "TEXT"),
    ("pause", "RUN"),
    ("status", "TEXT"),
    ("simulate", "TEXT"),
    ("simulate", "embedded", "--set", "TEXT"),
    ("simulate", "--resume", "TEXT"),
    ("compare", "TEXT", "--algorithms", "TEXT"),
    ("sweep", "demo_ferret", "--over", "TEXT"),
    ("settings", "TEXT"),
    ("apply", "TEXT", "TEXT", "--out", "new"),
    ("delta", "show", "TEXT"),
    ("deploy", "check", "TEXT"),
    ("deploy", "init", "new", "--server", "TEXT", "--nodes", "TEXT"),
    ("data", "show", "foreign.toml"),
    ("worker", "--address", "TEXT", "--status"),
    ("TEXT",),
    ("simulate", "--TEXT"),
)


def harmless(outcome: Outcome) -> None:
    assert not list(acting(outcome.out + outcome.err))
    assert "MarkupError" not in outcome.err
    assert "Unexpected" not in outcome.err, outcome.err


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_every_command_shows_a_strangers_run_as_text(fedtune: Fedtune, tmp_path: Path, text: str) -> None:
    stranger(tmp_path / "RUN", text)
    name = text if text.isprintable() else "[/]"  # a delta's header takes no other
    (tmp_path / "x.safetensors").write_bytes(encode(tiny(base=name, program=name)))
    for command in READ:
        outcome = fedtune(*command)
        harmless(outcome)
        assert (outcome.code, outcome.err) == (0, ""), (command, outcome.err)
        if text.isprintable() and "report" not in command and "$" not in text:
            assert text in outcome.out, command
    page = (tmp_path / "page.html").read_text()
    assert not [found for found in acting(page) if not found.startswith("INFO")]  # a browser has no log lines


@pytest.mark.parametrize("text", [ACTING, "[/]"], ids=ascii)
def test_every_refusal_quotes_a_stranger_as_text(fedtune: Fedtune, tmp_path: Path, text: str) -> None:
    text = text.replace("\x00", "")  # no argument of a process has one
    stranger(tmp_path / "RUN", text)
    (tmp_path / "foreign.toml").write_text(f"{json.dumps(text)} = 1\n")
    for command in REFUSED:
        outcome = fedtune(*(part.replace("TEXT", text) for part in command))
        harmless(outcome)
        assert outcome.code in (0, 1, 2), command
        assert outcome.err.count("\n") <= 1, command


@pytest.mark.parametrize("text", [ACTING, *MARKUP[:3]], ids=ascii)
def test_data_show_shows_rows_and_categories_as_text(fedtune: Fedtune, tiny_folder: Path, tmp_path: Path, text: str) -> None:
    rows = [{"instruction": f"{text} {n}", "output": f"{text}\n{n}", "category": text} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = RunConfig(
        model=str(tiny_folder), data="rows.jsonl", clients=2, clients_per_round=1, template="plain", min_samples=2, holdout=0.2,
        max_length=400,
    )  # fmt: skip
    (tmp_path / "small.toml").write_text("\n".join(config_lines(small)))
    outcome = fedtune("data", "show", "small.toml")
    assert outcome.code == 0, outcome.err
    shown = outcome.out.replace("\nINFO : round 9", "")  # inside the sample, whose line breaks are shown
    assert not list(acting(shown))
    assert shown.count("[[") == shown.count("]]") == 2
    if text in MARKUP:
        assert outcome.out.count(text) >= 5


def events(text: str) -> list[Event]:
    return [
        Note(text),
        Note(text, warning=True),
        RunStarted(text, 2, 2, 2, 3, 10, 10, text),
        RoundStarted(1, (text, "1")),
        ClientStep(text, 1, 3, 0.5),
        ClientFinished(1, text, text),
        EvaluationStep(text, 1, 2),
    ]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_run_is_told_in_lines_that_nobody_can_forge(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with watching():
        for event in events(text):
            emit(event)
    printed = capsys.readouterr().out
    assert not list(acting(printed))
    assert len(printed.splitlines()) == 5
    view, lines = RunView(clock=iter(range(0, 10_000, 60)).__next__), list[str]()
    log = LineLog(view, lines.append)
    for event in events(text):
        view(event)
        log(event)
    assert lines
    assert not [line for line in lines if list(acting(line, ""))]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_live_table_and_results_are_text(text: str) -> None:
    view = RunView()
    for event in events(text):
        view(event)
        _drawn(LiveRun(view))
    result = Result(text, 1, 0.5, 0.1, 1.0, 1.0, 1.0, 1.0, 1)
    sheet = results_sheet([result])
    for table in (sheet.for_screen(), result_table({"out": text, "digest": text}), comparison_table({text: {}})):
        _drawn(table)
    written = sheet.as_markdown()
    assert not list(acting(written))
    assert {line.replace(r"\|", "").count("|") for line in written.splitlines() if line.startswith("|")} == {10}


def _drawn(shown: object) -> None:
    file = io.StringIO()
    Screen(file=file, width=160, height=40, color_system=None).print(shown)
    assert not list(acting(file.getvalue()))


def test_an_error_is_one_harmless_line_also_with_its_traceback(
    fedtune: Fedtune, monkeypatch: pytest.MonkeyPatch, preset: Path
) -> None:
    for error in (DataError(ACTING), FedtuneError("[/]"), EngineError(ACTING, tail=[ACTING, "last"]), ValueError(ACTING * 99)):

        def run(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("fedtune.cli.simulate.runner", run)
        outcome = fedtune("simulate", "small.toml", "--quiet")
        assert outcome.err.count("\n") == 1
        assert not list(acting(outcome.err))
        debug = fedtune("simulate", "small.toml", "--quiet", "--debug").err
        assert "Traceback" in debug
        assert not [found for found in acting(debug, "\n\t") if not found.startswith("INFO")]
