"""The run folder: what is written is whole or absent, what cannot be read says so."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.config import RunConfig
from fedtune.errors import RunFolderError
from fedtune.run_folder import MOST_BYTES, RunFolder, check_new, versions


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "deep" / "run", {"preset": "demo", "rounds": 3}, RunConfig(rounds=3))


def test_create_records_what_was_asked_and_what_is_used(run: RunFolder) -> None:
    stored = json.loads((run.path / "config.json").read_text())
    assert stored["asked"] == {"preset": "demo", "rounds": 3}
    assert stored["used"] == RunConfig(rounds=3).as_mapping()
    assert run.config() == RunConfig(rounds=3)
    assert RunFolder.open(run.path) == run


def test_create_records_versions(run: RunFolder) -> None:
    assert run.read_json("versions.json") == versions()
    assert versions()["torch"].startswith(torch.__version__.split("+")[0])


def test_create_refuses_an_existing_folder_and_changes_nothing(run: RunFolder) -> None:
    before = sorted(run.path.iterdir())
    with pytest.raises(RunFolderError, match=r"run' exists already: give another folder with --out, or remove it\."):
        RunFolder.create(run.path, {}, RunConfig())
    assert sorted(run.path.iterdir()) == before
    assert run.config().rounds == 3


def test_check_new_refuses_anything_there_even_a_dead_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="exists already"):
        check_new(tmp_path / "link")
    check_new(tmp_path / "free")


def test_open_explains_a_missing_folder_and_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no run folder '.*none': give the folder that `fedtune simulate` printed"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"is not a run folder: it has no config\.json"):
        RunFolder.open(tmp_path)


def test_json_takes_numpy_torch_paths_and_tuples(run: RunFolder) -> None:
    run.write_json(
        "summary.json",
        {
            "a": np.float32(0.5),
            "b": np.int64(3),
            "c": np.arange(2),
            "d": torch.tensor(2.0),
            "e": Path("x"),
            "f": (1, None, True),
        },
    )
    assert run.summary() == {"a": 0.5, "b": 3, "c": [0, 1], "d": 2.0, "e": "x", "f": [1, None, True]}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("-inf"), torch.tensor(float("nan"))])
def test_a_number_that_is_not_finite_is_refused_and_the_old_file_stays(run: RunFolder, bad: object) -> None:
    run.write_json("summary.json", {"loss": 1.0})
    with pytest.raises(RunFolderError, match=r"summary\.json was not written: it holds a number that is not finite"):
        run.write_json("summary.json", {"loss": [bad]})
    assert run.summary() == {"loss": 1.0}
    run.write_json("summary.json", {"loss": [bad]}, null_for_nan=True)
    assert run.summary() == {"loss": [None]}


def test_what_json_cannot_hold_is_refused(run: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=r"partition\.json was not written: Object of type set"):
        run.write_json("partition.json", {"x": {1}})


def test_metrics_append_and_write_null_for_nan(run: RunFolder) -> None:
    assert run.read_metrics() == []
    run.append_metrics({"round": 0, "loss": 2.0})
    run.append_metrics({"round": 1, "loss": float("nan")})
    assert run.read_metrics() == [{"round": 0, "loss": 2.0}, {"round": 1, "loss": None}]
    assert (run.path / "metrics.jsonl").read_text() == '{"round": 0, "loss": 2.0}\n{"round": 1, "loss": null}\n'


@pytest.mark.parametrize("cut", range(1, 18))
def test_a_torn_last_line_is_ignored_and_cut_off_by_the_next_append(run: RunFolder, cut: int) -> None:
    run.append_metrics({"round": 0})
    run.append_metrics({"round": 1, "l": 1})
    target = run.path / "metrics.jsonl"
    target.write_bytes(target.read_bytes()[:-cut])
    assert run.read_metrics() == [{"round": 0}]
    run.append_metrics({"round": 1})
    assert run.read_metrics() == [{"round": 0}, {"round": 1}]


def test_damage_before_the_last_line_is_an_error(run: RunFolder) -> None:
    (run.path / "metrics.jsonl").write_bytes(b'{"round": 0\n{"round": 1}\n')
    with pytest.raises(RunFolderError, match=r"Line 1 of '.*metrics\.jsonl' is damaged"):
        run.read_metrics()


def test_missing_and_damaged_files_say_what_to_do(run: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=r"has no summary\.json: the run stopped before it was written, so run it again"):
        run.summary()
    (run.path / "summary.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"summary\.json' is damaged, not JSON"):
        run.summary()
    (run.path / "summary.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"summary\.json' is damaged, it holds no object"):
        run.summary()
    (run.path / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match="has no settings under 'used'"):
        run.config()


def test_a_file_of_any_size_is_mapped(run: RunFolder) -> None:
    """Of full weights, coefficients.bin has gigabytes: nothing reads it as a whole. A hole takes no room on the disk."""
    with (run.path / "coefficients.bin").open("wb") as file:
        file.truncate(MOST_BYTES + 2)
        file.seek(MOST_BYTES + 1)
        file.write(b"\x07")
    assert run.mapped("coefficients.bin")[-2:] == b"\x00\x07"
    with pytest.raises(RunFolderError, match="the most that it may have"):
        run.read_bytes("coefficients.bin")
    with pytest.raises(RunFolderError, match="run it again"):
        run.mapped("best_coefficients.bin")
    (run.path / "coefficients.bin").write_bytes(b"")
    assert run.mapped("coefficients.bin") == b""


def test_bytes_round_trip_and_leave_no_temporary_file(run: RunFolder) -> None:
    run.write_bytes("coefficients.bin", b"\x00\x01")
    run.write_bytes("coefficients.bin", b"\x02")
    assert run.read_bytes("coefficients.bin") == b"\x02"
    assert sorted(p.name for p in run.path.iterdir()) == ["coefficients.bin", "config.json", "versions.json"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/etc/x"])
def test_only_plain_names(run: RunFolder, name: str) -> None:
    with pytest.raises(RunFolderError, match="is not a plain file name"):
        run.write_bytes(name, b"")


def test_a_full_disk_is_named_and_the_old_file_stays(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_bytes("coefficients.bin", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"coefficients\.bin' could not be written: the disk is full\. Free some space"):
        run.write_bytes("coefficients.bin", b"new")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl' could not be written: the disk is full"):
        run.append_metrics({"round": 0})
    monkeypatch.undo()
    assert run.read_bytes("coefficients.bin") == b"old"
    assert not list(run.path.glob(".*"))


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"could not be made: File exists|could not be made: Not a directory"):
        RunFolder.create(tmp_path / "file" / "run", {}, RunConfig())
