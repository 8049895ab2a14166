"""What ran before changes nothing: in a process that has run another setting, every run is what it is in a fresh one.

Over all settings, so that a new one fails here until it has another value in the table of tests/laws/history.py.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from client.keeper import Keeper
from fedtune.config import RunConfig
from fedtune.declared import UndeclaredSettingError, only
from fedtune.errors import FedtuneError, Interrupted
from fedtune.models import load_model
from fedtune.progress import ClientStep, Event, listening
from fedtune.resident import DATA_SETTINGS, MODEL_SETTINGS, release, renewed, resident
from tests.laws.history import SMALL, TABLE, Outcome, Settings, outcome, pair, placed

ROOT = Path(__file__).parents[2]
KEYS = sorted((key for key in TABLE if key != "resume"), key=lambda key: repr(TABLE[key][0]))  # like beside like


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, instructions: Path) -> Path:
    """Two models, two files of data, and one that a client has for itself."""
    found = tmp_path_factory.mktemp("history")
    (found / "runs").mkdir()
    rows = [json.loads(line) for line in instructions.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        row["parity"] = "even" if number % 2 else "odd"
    parts = {"rows": rows[:40], "other": rows[40:], "own": rows[::7]}
    for name, part in parts.items():
        (found / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    for name in ("tiny", "other"):
        shutil.copytree(tiny_folder, found / name)
    _spoil(found / "other")
    return found


def _spoil(model: Path) -> None:
    """Other weights of the same architecture."""
    config = LlamaConfig.from_pretrained(model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(model)


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Settings], Outcome]:
    """The outcome of settings in a fresh process."""
    runs = [settings for key in KEYS for settings in pair(key)]
    different = {_name(settings): settings for settings in runs}
    outcomes = _once_for_all_workers(tmp_path_factory, lambda: _asked_of_fresh_processes(list(different.values()), folder))
    found = dict(zip(different, json.loads(outcomes), strict=True))
    return lambda settings: found[_name(settings)]


def _asked_of_fresh_processes(runs: Sequence[Settings], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.laws.history", str(folder)],
        input=json.dumps(runs), capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def _once_for_all_workers(factory: pytest.TempPathFactory, make: Callable[[], str]) -> str:
    """What `make` gives: pytest's workers, each of which has a folder in one of them all, make it once."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make()
    kept = factory.getbasetemp().parent / "outcomes-of-fresh-processes.json"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_text(make(), encoding="utf-8")
        return kept.read_text(encoding="utf-8")


def _name(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", cache(importlib.metadata.version))
    release()


def test_every_setting_is_in_the_table() -> None:
    assert set(TABLE) == set(RunConfig.model_fields)


# Settings that say where, how fast or with whom, or that need a hub or several devices: both values may lead to the same.
INERT = {
    "revision", "trust_remote_code", "device", "device_map", "offload", "threads", "out", "min_replies", "short_round",
    "round_timeout", "wait_timeout", "min_clients", "resume", "grace", "max_examples", "keep_updates",
}  # fmt: skip
BOTH = pytest.mark.parametrize("kept", [False, True], ids=["process", "worker"])


@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.long)], ids=["process", "worker"])
def test_every_run_is_what_it_is_in_a_fresh_process(kept: bool, folder: Path, expected: Callable[[Settings], Outcome]) -> None:
    """Every run follows one with another value of its setting, and is followed by one that has the usual value again."""
    keeper = Keeper() if kept else None
    different = [
        settings for settings in walk(KEYS[::-1] if kept else KEYS)
        if outcome(placed(settings, folder), folder, keeper) != expected(settings)
    ]  # fmt: skip
    assert not different


def walk(keys: Sequence[str]) -> Iterator[Settings]:
    """The runs with a changed setting, one after another; where what they have in common changes, the usual run between."""
    before: Settings | None = None
    for key in keys:
        usual, changed = pair(key)
        yield from [run for run in (before, usual) if run is not None and before != usual]
        yield changed
        before = usual
    if before is not None:
        yield before


def test_the_table_tells_values_apart(expected: Callable[[Settings], Outcome]) -> None:
    """A setting whose two values led to one outcome would pass the law whatever is kept."""
    alike = {key for key in KEYS if expected(pair(key)[0]) == expected(pair(key)[1])}
    assert alike <= INERT
    assert all(isinstance(loss, float) for key in KEYS for settings in pair(key) for _, loss, *_ in expected(settings)[-1:])


@BOTH
def test_a_resumed_run_goes_on_as_if_nothing_had_come_between(
    kept: bool, folder: Path, expected: Callable[[Settings], Outcome]
) -> None:
    keeper = Keeper() if kept else None
    first = placed(SMALL, folder)
    outcome(first, folder, keeper)
    outcome(placed(pair("seed")[1], folder), folder, keeper)
    longer = pair("rounds")[1]
    assert outcome(placed(longer, folder).replace(resume=first.out), folder, keeper) == expected(longer)


@BOTH
@pytest.mark.parametrize("end", ["diverged", "interrupted"])
def test_a_run_that_failed_leaves_nothing(
    kept: bool, end: str, folder: Path, expected: Callable[[Settings], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that wait, rounding in float32 and weights that are not finite stay with the run that has them."""
    keeper = Keeper() if kept else None
    usual, changed = pair("update_rounding")
    bad = placed({**changed, "update_rounding": "master", "lr": 1e30 if end == "diverged" else 1e-3}, folder)

    def stop(event: Event) -> None:
        if end == "interrupted" and isinstance(event, ClientStep):
            raise Interrupted("in the middle of a client's work")

    with listening(stop), suppress(FedtuneError):
        outcome(bad, folder, keeper)
    assert outcome(placed(usual, folder), folder, keeper) == expected(usual)


@BOTH
def test_files_that_were_changed_meanwhile_are_read_again(
    kept: bool, folder: Path, expected: Callable[[Settings], Outcome], tmp_path: Path
) -> None:
    """Under the same names, also behind a variable or relative to another folder."""
    keeper = Keeper() if kept else None
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(folder / "tiny", model)
    shutil.copy(folder / "rows.jsonl", data)
    asked = {**SMALL, "model": str(model), "data": str(data)}
    assert outcome(placed(asked, folder), folder, keeper) == expected(SMALL)
    shutil.rmtree(model)
    shutil.copytree(folder / "other", model)
    assert outcome(placed(asked, folder), folder, keeper) == expected(pair("model")[1])
    shutil.rmtree(model)
    shutil.copytree(folder / "tiny", model)
    shutil.copy(folder / "other.jsonl", data)
    assert outcome(placed(asked, folder), folder, keeper) == expected(pair("data")[1])


def test_a_name_that_means_another_folder_now_is_loaded_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = placed({**SMALL, "model": "${FT_MODEL}"}, folder)
    monkeypatch.setenv("FT_MODEL", str(folder / "tiny"))
    first = renewed(config).replica.fingerprint
    monkeypatch.setenv("FT_MODEL", str(folder / "other"))
    assert renewed(config).replica.fingerprint != first
    relative = placed({**SMALL, "model": "model"}, folder)
    found = []
    for name in ("tiny", "other"):
        place = folder / f"in-{name}"
        shutil.copytree(folder / name, place / "model")
        monkeypatch.chdir(place)
        found.append(renewed(relative).replica.fingerprint)
    assert found[0] == first != found[1]


def test_threads_are_those_of_the_model_that_is_used(folder: Path) -> None:
    two = placed({**SMALL, "threads": 2}, folder)
    before = torch.get_num_threads()
    try:
        assert resident(two).language_model.threads == torch.get_num_threads() == 2
        load_model(two.replace(threads=1))
        assert torch.get_num_threads() == 1
        assert resident(two).language_model.threads == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_how_points_are_evaluated_is_found_out_on_the_base_model(folder: Path) -> None:
    """And not on the first batch of the run that happened to come first; the weights are the run's again then."""
    config = placed({**SMALL, "family": "lowrank"}, folder)
    here = resident(config)
    state = here.algorithm.start(config, here.replica.layout)
    state = replace(state, values=np.full_like(state.values, 1e-2))
    model = state.published(config.coefficient_bits)
    work = here.work(config, "0", here.data.clients[0], 1, model)
    assert here.replica.perturbation.compared(work.directions)
    got = [weight.detach().clone() for weight in here.replica.weights]
    here.replica.touch()
    here.replica.become(model)
    assert all(torch.equal(one, other) for one, other in zip(got, here.replica.weights, strict=True))


# ---------------------------------------------------------------------------------------------------- what may be read


@pytest.mark.parametrize("name", ["lr", "batch_size", "update_rounding", "asked_per_round", "as_mapping", "replace"])
def test_what_stays_loaded_cannot_read_a_setting_that_it_does_not_name(name: str) -> None:
    view = only(RunConfig(), MODEL_SETTINGS, "the model")
    assert (view.dtype, view.first_order) == ("float32", False)
    with pytest.raises(UndeclaredSettingError, match=r"'.*' was read by the model, which stays loaded .* hand the value in"):
        getattr(view, name)


def test_what_is_named_are_settings() -> None:
    assert set(MODEL_SETTINGS) | set(DATA_SETTINGS) <= set(RunConfig.model_fields)
    assert resident(RunConfig(lr=1)) is resident(RunConfig(lr=2, rounds=3))
    assert resident(RunConfig(seed=1)) is not resident(RunConfig(seed=2))
