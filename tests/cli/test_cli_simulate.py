"""`fedtune simulate` and `fedtune demo` on an engine that plays back events: folders, output, JSON, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playback import PARAMETERS, Outcome, last_json, play
from rich.console import Console

from fedtune import progress
from fedtune.cli import demo as demo_module
from fedtune.cli.presets import shipped
from fedtune.cli.tables import MOST_CATEGORIES, comparison_table, result_table
from fedtune.cli.watch import watching
from fedtune.config import RunConfig
from fedtune.errors import Interrupted


def test_a_run_ends_with_before_and_after(fedtune: Callable[..., Outcome], engine: list[RunConfig], preset: Path) -> None:
    outcome = fedtune("simulate", "small.toml", "--out", "deep/run")
    assert (outcome.code, outcome.err) == (0, "")
    assert engine[0].out == "deep/run"
    assert outcome.out.startswith("loading model and data\nfedkseed: 1,000,000 parameters, 2 of 4 clients a round")
    assert re.search(r"(?m)held-out loss +3\.0000 +2\.5000 *$", outcome.out)
    assert re.search(r"(?m)ROUGE-L +0\.1000 +0\.4000 *$", outcome.out)
    assert re.search(r"(?m)payload, client and round +100 B up, 1\.00 kB down *$", outcome.out)
    assert re.search(r"(?m)FedAvg, the same rounds +32\.0 MB \(7,270x as much\) *$", outcome.out)
    assert re.search(r"(?m)digest of the model +abababababababababababababababab *$", outcome.out)
    assert re.search(r"(?m)run folder +deep/run *$", outcome.out)


def test_the_default_folder_has_preset_and_time(fedtune: Callable[..., Outcome], engine: list[RunConfig], preset: Path) -> None:
    assert fedtune("simulate", str(preset)).code == 0
    assert re.fullmatch(r"runs/small-\d{8}-\d{6}", engine[0].out)
    preset.write_text(preset.read_text() + 'out = "mine"\n')
    assert fedtune("simulate", str(preset)).code == 0
    assert engine[1].out == "mine"


def test_an_existing_folder_is_refused_before_anything_else(
    fedtune: Callable[..., Outcome], engine: list[RunConfig], preset: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    outcome = fedtune("simulate", "small.toml", "--out", "run")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "Error: 'run' exists already: give another folder with --out, or remove it.\n"
    assert engine == []


def test_json_is_the_last_line_and_the_only_one(fedtune: Callable[..., Outcome], engine: list[RunConfig], preset: Path) -> None:
    outcome = fedtune("simulate", "small.toml", "--json", "--out", "a", "--set", "rounds=1")
    assert outcome.out.count("\n") == 1
    assert last_json(outcome.out)["out"] == "a"
    assert "round 1, 2 clients" in outcome.err
    quiet = fedtune("simulate", "small.toml", "--json", "--quiet", "--out", "b")
    assert (quiet.err, last_json(quiet.out)["fedavg_bytes"]) == ("", 8 * PARAMETERS * 4)


def test_quiet_prints_the_result_only(fedtune: Callable[..., Outcome], engine: list[RunConfig], preset: Path) -> None:
    outcome = fedtune("simulate", "small.toml", "--quiet", "--out", "a")
    assert "round 1" not in outcome.out
    assert "held-out loss" in outcome.out


def test_the_flower_engine_gets_the_workers(fedtune: Callable[..., Outcome], engine: list[RunConfig], preset: Path) -> None:
    assert fedtune("simulate", "small.toml", "--engine", "flower", "--workers", "3", "--out", "a").code == 0
    assert engine[0].threads == 3
    outcome = fedtune("simulate", "small.toml", "--engine", "spark")
    assert outcome.code == 2
    assert "'spark' is not one of 'in-process', 'flower'" in outcome.err


def test_the_demo_compares_both_runs(
    fedtune: Callable[..., Outcome], engine: list[RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = []
    for name in ("one", "two"):
        files.append(tmp_path / f"{name}.toml")
        files[-1].write_text("rounds = 1")
    monkeypatch.setattr(demo_module, "PRESETS", tuple(str(path) for path in files))
    outcome = fedtune("demo", "--json")
    assert outcome.code == 0
    assert list(last_json(outcome.out)) == [str(path) for path in files]
    assert re.search(r"(?m)held-out loss, after +2\.5000 +2\.5000 *$", outcome.err)
    assert re.search(r"(?m)FedAvg / payload +7,270x +7,270x *$", outcome.err)


def test_the_demo_presets_ship() -> None:
    assert set(demo_module.PRESETS) <= {preset.name for preset in shipped()}


def test_the_demo_refuses_an_existing_folder_before_the_first_run(
    fedtune: Callable[..., Outcome], engine: list[RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "here" / "demo_ferret").mkdir(parents=True)
    outcome = fedtune("demo", "--out", "here")
    assert (outcome.code, engine) == (1, [])
    assert "'here/demo_ferret' exists already" in outcome.err


def _text(renderable: object) -> str:
    console = Console(width=150, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_tables_stand_a_run_that_measured_little() -> None:
    bare = {"initial_loss": None, "final_loss": None, "out": "x"}
    assert "ROUGE-L" not in _text(result_table(bare))
    assert "held-out loss" in _text(result_table(bare))
    assert "FedAvg / payload" in _text(comparison_table({"a": bare}))


def test_the_result_has_accuracy_and_a_line_for_each_category() -> None:
    moods = {"samples": 3, "initial_loss": 2.0, "final_loss": 1.5, "initial_accuracy": 0.5, "final_accuracy": 0.75}
    other = {"samples": 1, "initial_loss": 4.0, "final_loss": None, "initial_accuracy": None, "final_accuracy": None}
    scored = {"initial_accuracy": 0.25, "final_accuracy": 1.0, "categories": {"moods\x1b[2J": moods, "": other}, "out": "x"}
    lines = [line.rstrip() for line in _text(result_table(scored)).splitlines()]
    assert re.fullmatch(r"accuracy +0\.2500 +1\.0000", lines[3])
    assert re.fullmatch(r"  moods\S+ +2\.0000 +1\.5000", lines[4])
    assert re.fullmatch(r"    accuracy +0\.5000 +0\.7500", lines[5])
    assert re.fullmatch(r"  \(none\) +4\.0000 +-", lines[6])
    assert "\x1b" not in "".join(lines)
    many = {str(number): moods for number in range(MOST_CATEGORIES + 2)}
    assert "... 2 more categories in summary.json" in _text(result_table({**scored, "categories": many}))
    assert re.search(r"accuracy, after +1\.0000", _text(comparison_table({"a": scored})))
    for odd in (3, [1], {"a": 5}):
        assert "FedAvg" in _text(result_table({**scored, "categories": odd}))


# ---------------------------------------------------------------------------------------------------- Ctrl-C


def test_the_first_ctrl_c_stops_after_the_step_in_hand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    config = RunConfig(rounds=3, local_steps=4, out=str(tmp_path / "run"))
    seen: list[progress.Event] = []

    def interrupt_in_round_2(event: progress.Event) -> None:
        seen.append(event)
        if isinstance(event, progress.ClientStep) and len(_rounds(seen)) == 2 and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted), watching(quiet=True) as view, progress.listening(interrupt_in_round_2):
        play(config)
    steps = [event for event in seen if isinstance(event, progress.ClientStep)]
    assert steps[-1].step == 2
    assert [row.round for row in view.rows] == [0, 1]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
    assert "Stopping after the step in hand; Ctrl-C again stops at once." in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    progress.clear_stop()


def _rounds(events: list[progress.Event]) -> list[progress.Event]:
    return [event for event in events if isinstance(event, progress.RoundStarted)]


def test_a_stopped_run_says_how_far_it_came_and_where_it_is(
    fedtune: Callable[..., Outcome], engine: list[RunConfig], preset: Path
) -> None:
    def stop_in_round_2(event: progress.Event) -> None:
        if isinstance(event, progress.RoundStarted) and event.round == 2:
            progress.request_stop()

    with progress.listening(stop_in_round_2):
        outcome = fedtune("simulate", "small.toml", "--quiet", "--out", "run")
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err == (
        "Stopped after 1 of 2 rounds; model and metrics are in 'run', and `fedtune simulate --resume run` carries it on.\n"
    )


def test_the_second_ctrl_c_stops_at_once() -> None:
    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with watching(quiet=True), pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    progress.clear_stop()


def test_a_new_run_forgets_an_old_request_to_stop(tmp_path: Path) -> None:
    progress.request_stop()
    with watching(quiet=True):
        play(RunConfig(rounds=1, local_steps=1, out=str(tmp_path / "run")))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final_loss"] == 2.5


def test_a_terminal_gets_the_live_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with watching():
        progress.emit(progress.Note("device: cpu"))
        play(RunConfig(rounds=1, local_steps=1, out=str(tmp_path / "run")))
    out = capsys.readouterr().out
    assert "device: cpu" in out
    assert "payload so far" in out
    assert "\x1b[?25h" in out  # the cursor is back
