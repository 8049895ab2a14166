"""Events and errors arrive from another process as they were."""

from __future__ import annotations

import json

import pytest

from fedtune import errors, progress
from fedtune.errors import EngineError, RunFolderError
from simulations.engines import relay

EVENTS = [
    progress.Note("device: cpu (no GPU)", warning=True),
    progress.RunStarted("ferret", 3, 8, 4, 50, 260_000, 260_000, "/run"),
    progress.RoundStarted(1, ("0", "3")),
    progress.ClientStep("3", 2, 50, 4.25),
    progress.ClientFinished(1, "3", "non-finite"),
    progress.EvaluationStep("loss", 16, 64),
    progress.RoundFinished(1, {"eval_loss": None, "clients": ["0", "3"], "seconds": {"clients": 0.5}}),
    progress.RunFinished({"digest": "ab", "final_loss": 3.5}),
]


@pytest.fixture
def path(tmp_path, monkeypatch):
    file = tmp_path / "relay.jsonl"
    monkeypatch.setenv(relay.VARIABLE, str(file))
    return file


def test_every_kind_of_event_arrives_equal_and_once(path):
    reader = relay.Reader(path)
    assert reader.read() == []
    with relay.relaying(with_error=True):
        for event in EVENTS[:3]:
            progress.emit(event)
        assert reader.read() == EVENTS[:3]
        for event in EVENTS[3:]:
            progress.emit(event)
    assert reader.read() == EVENTS[3:]
    assert reader.read() == []
    assert reader.error is None
    assert {type(event).__name__ for event in EVENTS} == set(relay._EVENTS)


def test_two_processes_append_to_one_file(path):
    with relay.relaying(with_error=True):
        progress.emit(EVENTS[0])
    with relay.relaying(with_error=False):
        progress.emit(EVENTS[1])
    assert relay.Reader(path).read() == EVENTS[:2]


def test_a_line_that_is_not_whole_waits(path):
    reader = relay.Reader(path)
    with relay.relaying(with_error=True):
        progress.emit(EVENTS[0])
        progress.emit(EVENTS[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert reader.read() == EVENTS[:1]
    path.write_bytes(whole)
    assert reader.read() == EVENTS[1:2]


def test_fedtunes_errors_keep_type_text_and_facts(path):
    with pytest.raises(RunFolderError), relay.relaying(with_error=True):
        raise RunFolderError("'/x' exists already.", path="/x", errno=17)
    reader = relay.Reader(path)
    assert reader.read() == []
    assert type(reader.error) is RunFolderError
    assert str(reader.error) == "'/x' exists already."
    assert reader.error.facts == {"path": "/x", "errno": 17}


@pytest.mark.parametrize("name", sorted(errors.KINDS))
def test_every_error_can_be_rebuilt(path, name):
    kind = getattr(errors, name)
    with pytest.raises(kind), relay.relaying(with_error=True):
        raise kind("text", shape=(1, 2))
    reader = relay.Reader(path)
    reader.read()
    assert (type(reader.error), str(reader.error), reader.error.facts) == (kind, "text", {"shape": [1, 2]})


def test_other_exceptions_become_an_engine_error_with_the_last_lines(path):
    with pytest.raises(ZeroDivisionError), relay.relaying(with_error=True):
        print(1 / 0)
    reader = relay.Reader(path)
    reader.read()
    assert type(reader.error) is EngineError
    assert str(reader.error).startswith("The server stopped with ZeroDivisionError: division by zero.")
    assert reader.error.facts["tail"][-1] == "ZeroDivisionError: division by zero"


def test_a_clients_error_is_not_the_runs(path):
    with pytest.raises(ZeroDivisionError), relay.relaying(with_error=False):
        print(1 / 0)
    reader = relay.Reader(path)
    assert reader.read() == []
    assert reader.error is None


def test_without_a_file_nothing_is_written(path, monkeypatch):
    monkeypatch.delenv(relay.VARIABLE)
    with relay.relaying(with_error=True):
        progress.emit(EVENTS[0])
    assert not path.exists()


def test_a_fact_that_json_cannot_hold_becomes_text(path):
    with pytest.raises(RunFolderError), relay.relaying(with_error=True):
        raise RunFolderError("text", where=path)
    assert json.loads(path.read_text())["facts"] == {"where": str(path)}
