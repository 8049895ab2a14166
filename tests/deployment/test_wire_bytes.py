"""Bytes on the wire of a real run: SuperNodes and a SuperLink with a counting proxy between them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.config import RunConfig
from fedtune.overheads import wire_estimate
from fedtune.traffic import Traffic
from simulations import wire
from simulations.attribution import Bytes
from simulations.engines.processes import living
from simulations.wire import Measured, measure

pytestmark = pytest.mark.deployment

TINY = {
    "algorithm": "fedkseed", "rounds": 2, "local_steps": 4, "batch_size": 2, "K": 64, "lr": 4e-4, "model": "embedded",
    "data": "embedded", "template": "chat", "max_length": 64, "clients": 2, "clients_per_round": 2, "eval_samples": 5,
    "holdout_category": "unseen", "threads": 1, "device": "cpu",
}  # fmt: skip
MORE_UP, MORE_DOWN = 12_000, 4_000  # bytes above the payload of a client and round: 9,161 and 2,194 were measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    out = tmp_path_factory.mktemp("wire") / "run"
    said: list[str] = []
    found = measure("tiny", RunConfig.from_mapping({**TINY, "out": str(out)}), tls=False, idle=10.0, say=said.append)
    assert said[-1] == "ending all processes"
    assert "round 2 of 2" in said
    return found


def cells(found: Measured) -> list[tuple[Traffic, Bytes]]:
    return [(sent, found.wire[client].rounds[number]) for number, row in found.rounds.items() for client, sent in row.items()]


def test_each_level_holds_the_one_before(measured: Measured) -> None:
    assert len(cells(measured)) == 4
    for sent, seen in cells(measured):
        assert seen.up >= sent.serialised_up >= sent.payload_up > 0
        assert seen.down >= sent.serialised_down >= sent.payload_down > 0


def test_a_round_on_the_wire_is_kilobytes(measured: Measured) -> None:
    for sent, seen in cells(measured):
        assert seen.up <= sent.payload_up + MORE_UP
        assert seen.down <= sent.payload_down + MORE_DOWN


def test_the_estimate_without_a_proxy_is_near(measured: Measured) -> None:
    for sent, seen in cells(measured):
        assert wire_estimate(sent) == pytest.approx(seen, rel=0.03)


def test_the_bundle_and_the_idle_time_are_told_apart(measured: Measured) -> None:
    for parts in measured.wire.values():
        assert measured.bundle < parts.bundle.down < measured.bundle + 1000
        assert parts.introduction.up > 0
        assert 8_000 < parts.idle_minute.up < 40_000  # a request of 853 bytes every 3 s, and a sign of life
    assert measured.base is not None
    assert measured.base > 400_000
    assert 71 <= measured.catch_up <= 71 + 64


def test_what_is_printed_and_what_programs_read_agree(measured: Measured) -> None:
    text, numbers = "\n".join(wire.lines(measured)), json.loads(json.dumps(wire.as_json(measured)))
    assert f"{numbers['rounds']['1']['0']['wire'][0]:,}" in text
    assert f"{numbers['once']['bundle']:,}" in text
    total = numbers["clients"]["1"]["total"]
    assert f"{total[0]:,} / {total[1]:,}" in text


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset whose data is not there: the ServerApp fails, the exit code says so, and no process stays."""
    preset = tmp_path / "broken.toml"
    preset.write_text(f'data = "{tmp_path}/nowhere.jsonl"\nclients = 1\nclients_per_round = 1\n')
    before = {path.name for path in Path("/tmp").glob("fedtune-*")}
    assert wire.main([str(preset), "--idle", "0"]) == 1
    assert "Error: Flower ended the run as 'finished:failed" in capsys.readouterr().err
    left = [path for path in Path("/tmp").glob("fedtune-*") if path.name not in before and living(path)]
    assert left == []
