"""The real Flower engine end to end: the same digest as in process, typed failures, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedtune import progress
from fedtune.errors import DataError, EngineError, Interrupted
from fedtune.run_folder import RunFolder
from simulations.engines import flower, superlink
from simulations.engines.flower import run_flower
from simulations.engines.flower_app import config_lines
from simulations.engines.in_process import run_in_process
from simulations.engines.processes import living

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def homes(monkeypatch) -> Iterator[Path]:
    """The folder for the SuperLinks' homes; afterwards it is empty and no process works in it."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder:
        monkeypatch.setattr(superlink, "_short_temporary", lambda: folder)
        yield Path(folder)
        assert living(Path(folder)) == []
        assert list(Path(folder).iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["fedkseed", "ferret", "subspace"])
def test_flower_and_in_process_reach_the_same_model(small, tmp_path, homes, algorithm):
    events: list[progress.Event] = []
    with progress.listening(events.append):
        there = run_flower(small("flower", algorithm=algorithm), workers=2)
    here = run_in_process(small("here", algorithm=algorithm))
    assert there["digest"] == here["digest"]
    assert there["final_loss"] == here["final_loss"]
    assert there["payload_bytes_up"] == here["payload_bytes_up"]
    kept = [(tmp_path / name / "coefficients.bin").read_bytes() for name in ("flower", "here")]
    assert kept[0] == kept[1]
    rows = RunFolder.open(tmp_path / "flower").read_metrics()
    assert [event.metrics for event in events if isinstance(event, progress.RoundFinished)] == rows
    assert len(rows) == 3
    steps = [event for event in events if isinstance(event, progress.ClientStep)]
    assert {event.client for event in steps} == {"0", "1", "2", "3"}
    assert isinstance(events[-1], progress.RunFinished)
    assert events[-1].summary == there


@pytest.mark.faults
def test_a_failing_server_gives_its_own_error(small, tmp_path, homes):
    with pytest.raises(DataError) as there:
        run_flower(small("flower", data=str(tmp_path / "missing.jsonl")), workers=1)
    with pytest.raises(DataError) as here:
        run_in_process(small("here", data=str(tmp_path / "missing.jsonl")))
    assert (type(there.value), str(there.value)) == (type(here.value), str(here.value))
    assert there.value.facts["tail"]


@pytest.mark.faults
def test_a_runtime_that_cannot_start_its_workers_is_an_engine_error(small, homes, monkeypatch):
    too_much = {"client-resources-num-cpus": 8, "init-args-num-cpus": 1}
    monkeypatch.setattr(flower._Device, "resources", lambda self, workers, asked: too_much)
    with pytest.raises(EngineError, match=r"Flower ended the run as 'finished:failed': .*ActorPool is empty") as caught:
        run_flower(small("out"), workers=1)
    assert caught.value.facts["tail"]


@pytest.mark.faults
def test_a_request_to_stop_ends_everything(small, tmp_path, homes):
    def stop_in_first_round(event: progress.Event) -> None:
        if isinstance(event, progress.RoundFinished):
            progress.request_stop()

    try:
        with pytest.raises(Interrupted), progress.listening(stop_in_first_round):
            run_flower(small("out", rounds=1000), workers=1)
    finally:
        progress.clear_stop()
    rows = RunFolder.open(tmp_path / "out").read_metrics()
    assert 1 <= len(rows) < 1000


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_everything(small, tmp_path, homes, number):
    config = small("out", rounds=1000)
    code = (
        "from fedtune.config import RunConfig\n"
        "from simulations.engines import flower, superlink\n"
        f"superlink._short_temporary = lambda: {str(homes)!r}\n"
        f"flower.run_flower(RunConfig.from_mapping({config.as_mapping()!r}), workers=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert metrics.exists(), errors.decode()
    assert process.returncode in ({-signal.SIGINT, 1, 130} if number == signal.SIGINT else {128 + signal.SIGTERM})


@pytest.mark.faults
def test_a_caller_that_is_killed_leaves_nothing_and_a_resume_ends_the_same(small, tmp_path, homes):
    """kill -9 of `fedtune simulate --engine flower` in the middle of a round; `--resume --engine flower` carries it on."""
    expected = run_in_process(small("here", rounds=4, local_steps=40))
    preset = tmp_path / "preset.toml"
    preset.write_text("\n".join(config_lines(small("", rounds=4, local_steps=40, out=""))))
    command = [sys.executable, "-m", "fedtune.cli", "simulate", "--engine", "flower", "--workers", "1"]
    environment = {**os.environ, "TMPDIR": str(homes), "PYTHONPATH": str(ROOT)}
    out, log = tmp_path / "killed", tmp_path / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, str(preset), "--out", str(out)], env=environment, stdout=output, stderr=output)
        metrics, deadline = out / "metrics.jsonl", time.monotonic() + 240
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 1):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert wait_until(lambda: living(homes) == [] and list(homes.iterdir()) == [])
    assert not (out / "summary.json").exists()
    done = subprocess.run([*command, "--resume", str(out), "--json"], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout.splitlines()[-1])["digest"] == expected["digest"]
    rows = RunFolder.open(out).read_metrics()
    assert [row["digest"] for row in rows] == [row["digest"] for row in RunFolder.open(tmp_path / "here").read_metrics()]


def wait_until(fact: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether `fact` came true in time."""
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
