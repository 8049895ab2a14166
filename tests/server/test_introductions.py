"""Before the first round: who is let in, and what is said to those who are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.app
from fedtune.config import RunConfig
from fedtune.errors import DataError, ModelError, RunError, WireError
from fedtune.run_folder import RunFolder
from simulations.engines.local_grid import Faults
from tests.laws.federation import config, run

Change = Callable[[int, ConfigRecord], ConfigRecord]


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> RunConfig:
    return config("fedkseed", tiny_folder, instructions, tmp_path / "run", rounds=1)


def introducing(change: Change) -> Callable[[Message, Context], Message]:
    """The ClientApp, but with its introduction changed by partition id."""

    def handler(message: Message, context: Context) -> Message:
        reply = client.app.app(message, context)
        if message.metadata.message_type != "query":
            return reply
        record = change(int(context.node_config["partition-id"]), reply.content.config_records["fedtune"])
        return Message(RecordDict({"fedtune": record}), reply_to=message)

    return handler


def test_a_client_with_another_base_model_is_refused_and_the_others_go_on(settings: RunConfig) -> None:
    def change(partition: int, record: ConfigRecord) -> ConfigRecord:
        return ConfigRecord({**record, "fingerprint": b"?" * 16}) if partition == 2 else record

    outcome = run(settings, handler=introducing(change))
    assert "2" not in outcome.folder.read_metrics()[1]["clients"]


def test_if_too_few_remain_the_first_reason_is_the_error(settings: RunConfig) -> None:
    def change(partition: int, record: ConfigRecord) -> ConfigRecord:
        return ConfigRecord({**record, "fingerprint": b"?" * 16}) if partition < 2 else record

    with pytest.raises(ModelError, match="holds another base model than the server"):
        run(settings, handler=introducing(change))
    assert RunFolder.open(settings.out).read_json("error.json")["type"] == "ModelError"


def test_a_clients_own_problem_keeps_its_type(settings: RunConfig) -> None:
    def change(partition: int, record: ConfigRecord) -> ConfigRecord:
        return ConfigRecord({"problem": "DataError", "text": "There is no data file 'x'."})

    with pytest.raises(DataError, match="no data file 'x'"):
        run(settings, handler=introducing(change))


def test_a_made_up_error_type_is_not_trusted(settings: RunConfig) -> None:
    def change(partition: int, record: ConfigRecord) -> ConfigRecord:
        return ConfigRecord({"problem": "annotations", "text": "hello"})

    with pytest.raises(RunError.__base__, match="hello"):
        run(settings, handler=introducing(change))


@pytest.mark.parametrize(
    "broken", [{"examples": 0}, {"examples": "many"}, {"client": 3}], ids=["no samples", "not a number", "no id"]
)
def test_an_introduction_without_id_or_samples_is_refused(settings: RunConfig, broken: dict[str, object]) -> None:
    with pytest.raises(WireError, match="without a client id or without samples"):
        run(settings, handler=introducing(lambda partition, record: ConfigRecord({**record, **broken})))


def test_two_nodes_with_one_id_are_told_apart(settings: RunConfig) -> None:
    with pytest.raises(WireError, match="Two nodes call themselves client 0"):
        run(settings, handler=introducing(lambda partition, record: ConfigRecord({**record, "client": "0"})))


def test_a_crash_of_the_client_app_is_named(settings: RunConfig) -> None:
    def handler(message: Message, context: Context) -> Message:
        raise ValueError("boom")

    with pytest.raises(RunError, match=r"Flower code 2.*boom"):
        run(settings, handler=handler)


def test_nodes_that_never_come_are_waited_for_and_counted(settings: RunConfig) -> None:
    with pytest.raises(RunError, match=r"0 of 4 nodes connected within 0\.3 s"):
        run(settings.replace(wait_timeout=0.3), Faults(empty_polls=10**6))


def test_nodes_that_come_late_are_waited_for(settings: RunConfig) -> None:
    assert run(settings, Faults(empty_polls=3)).summary["rounds"] == 1
