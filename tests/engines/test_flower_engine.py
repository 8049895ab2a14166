"""How the Flower engine divides hardware, reads logs and starts, without starting a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune import progress
from fedtune.config import RunConfig
from fedtune.errors import EngineError, RunFolderError
from simulations.engines import flower, superlink
from simulations.engines.flower import _Device, _Log, run_flower
from simulations.engines.superlink import SuperLink


@pytest.mark.parametrize(
    ("gpus", "workers", "expected"),
    [
        (0, 3, {"client-resources-num-cpus": 1, "init-args-num-cpus": 3}),
        (1, 0, {"init-args-num-cpus": 1, "client-resources-num-gpus": 1.0, "init-args-num-gpus": 1}),
        (1, 4, {"init-args-num-cpus": 4, "client-resources-num-gpus": 0.25, "init-args-num-gpus": 1}),
        (4, 0, {"init-args-num-cpus": 4, "client-resources-num-gpus": 1.0, "init-args-num-gpus": 4}),
        (8, 3, {"init-args-num-cpus": 3, "client-resources-num-gpus": 2.0, "init-args-num-gpus": 8}),
    ],
)
def test_workers_share_the_gpus(gpus, workers, expected):
    settings = _Device("cuda" if gpus else "cpu", {}, gpus).resources(workers, asked=100)
    assert settings == {"client-resources-num-cpus": 1, **expected}


def test_no_more_workers_than_clients_and_cores(monkeypatch):
    monkeypatch.setattr(flower.os, "cpu_count", lambda: 16)
    assert _Device("cpu", {}, 0).resources(0, asked=4)["init-args-num-cpus"] == 4
    assert _Device("cpu", {}, 0).resources(0, asked=40)["init-args-num-cpus"] == 16


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cpu", "", ("cpu", {}, 0)),
        ("auto", "", ("cuda", {}, 4)),
        ("cuda", "", ("cuda", {}, 4)),
        ("cuda:2", "", ("cuda", {"CUDA_VISIBLE_DEVICES": "2"}, 1)),
        ("cuda:1", "6,7", ("cuda", {"CUDA_VISIBLE_DEVICES": "7"}, 1)),
    ],
)
def test_a_numbered_gpu_becomes_the_only_one(monkeypatch, device, visible, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: "a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = _Device.of(RunConfig().replace(device=device))
    assert (found.name, found.environment, found.gpus) == expected


def test_warnings_become_notes_and_the_rest_only_fills_the_tail():
    log = _Log()
    notes: list[progress.Event] = []
    lines = [
        "\x1b[92mINFO \x1b[0m:     hello",
        "",
        "\x1b[93mWARNING \x1b[0m:  Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.",
        "\x1b[93mWARNING \x1b[0m:  client 3 is late",
        "\x1b[91mERROR \x1b[0m:    it broke",
    ]
    with progress.listening(notes.append):
        log.take(lines)
    assert notes == [progress.Note("client 3 is late", warning=True), progress.Note("it broke", warning=True)]
    assert [line.split()[0] for line in log.tail] == ["INFO", "WARNING", "WARNING", "ERROR"]
    assert log.first_error == "it broke"


def test_a_dead_worker_process_ends_the_run():
    with pytest.raises(EngineError, match="A worker process died, perhaps for want of memory: use fewer workers") as caught:
        _Log().take(["before", "ray.exceptions.ActorDiedError: The actor died"])
    assert caught.value.facts["tail"] == ("before", "ray.exceptions.ActorDiedError: The actor died")


def test_an_existing_run_folder_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(flower, "SuperLink", lambda environment: pytest.fail("started"))
    with pytest.raises(RunFolderError, match="exists already"):
        run_flower(RunConfig().replace(out=str(tmp_path)))


def test_missing_programs_are_named_and_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(superlink, "_short_temporary", lambda: str(tmp_path))
    monkeypatch.setattr(superlink, "_environment", lambda home: {"PATH": "/nowhere"})
    with pytest.raises(EngineError, match=r"'flower-superlink' is neither in .* nor on the PATH: install Flower with"):
        SuperLink()
    assert list(tmp_path.iterdir()) == []


def test_a_superlink_that_ends_is_an_error_with_its_last_lines(tmp_path, monkeypatch):
    program = tmp_path / "flower-superlink"
    program.write_text("#!/bin/sh\necho cannot bind\nexit 3\n")
    program.chmod(0o755)
    homes = tmp_path / "homes"
    homes.mkdir()
    monkeypatch.setattr(superlink, "_short_temporary", lambda: str(homes))
    monkeypatch.setattr(superlink, "_environment", lambda home: {"PATH": f"{tmp_path}:/bin:/usr/bin", "FLWR_HOME": str(home)})
    with pytest.raises(EngineError, match="Flower's SuperLink ended unexpectedly") as caught:
        SuperLink()
    assert caught.value.facts["tail"] == ("cannot bind",)
    assert list(homes.iterdir()) == []


def test_processes_get_the_switches_and_fedtune_but_no_foreign_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("PYTHONPATH", "relative")
    found = superlink._environment(Path("/tmp/fedtune-x"))
    assert "RAY_ADDRESS" not in found
    assert found["PYTHONPATH"].split(":")[0] == str(Path("relative").absolute())
    assert found["FLWR_HOME"] == found["RAY_TMPDIR"] == "/tmp/fedtune-x"
    assert found["no_proxy"].split(",")[-1] == found["NO_PROXY"].split(",")[-1] == "127.0.0.1"
    assert {found["FLWR_TELEMETRY_ENABLED"], found["RAY_USAGE_STATS_ENABLED"]} == {"0"}
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == found["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_the_answer_of_a_command_follows_its_warnings():
    assert superlink._json_in('note: x\n{"success": true, "run-id": 7}\n') == {"success": True, "run-id": 7}
    assert superlink._json_in("no answer") == superlink._json_in("{broken") == {}
