"""Before the first round: who is let in, and what is said to those who are not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.app
import fedtune as package
from fedtune.config import RunConfig
from fedtune.directions.base import F32
from fedtune.directions.families import Hadamard
from fedtune.errors import (
    DataError,
    DirectionsError,
    FedtuneError,
    MalformedMessageError,
    MismatchError,
    ModelError,
    RunError,
    WireError,
)
from fedtune.progress import Event, Note, listening
from fedtune.run_folder import RunFolder
from fedtune.selftest import decode, encode, self_test
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

    heard: list[Event] = []
    with listening(heard.append):
        outcome = run(settings, handler=introducing(change))
    assert outcome.folder.read_metrics()[1]["clients"] == ["0", "1", "3"]
    refused = [event.text for event in heard if isinstance(event, Note) and event.warning]
    assert [text.startswith("Client 2 was refused: it holds another base model") for text in refused] == [True]


def test_if_too_few_remain_the_first_reason_is_the_error(settings: RunConfig) -> None:
    def change(partition: int, record: ConfigRecord) -> ConfigRecord:
        return ConfigRecord({**record, "fingerprint": b"?" * 16}) if partition < 2 else record

    with pytest.raises(ModelError, match="holds another base model than the server"):
        run(settings, handler=introducing(change))
    assert RunFolder.open(settings.out).read_json("error.json")["type"] == "ModelError"


@contextmanager
def another_version() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "__version__", "9.9.9")
        yield


@contextmanager
def a_kernel_that_is_off() -> Iterator[None]:
    """In the last bit of one element, as a fused multiply-add would be."""
    real = Hadamard.add

    def off(self: Hadamard, out: F32, base: F32, p0: int, k: int, c: float) -> None:
        real(self, out, base, p0, k, c)
        if out.dtype == np.float32:
            out[-1] = np.nextafter(out[-1], np.float32(9))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hadamard, "add", off)
        yield


@contextmanager
def nothing_else() -> Iterator[None]:
    yield


UNFIT: dict[str, tuple[Callable[[], AbstractContextManager[None]], dict[str, object], type[FedtuneError], str]] = {
    "another version": (another_version, {}, MismatchError, r"it runs fedtune 9\.9\.9 and the server 0\.1\.0 \(install"),
    "another kernel": (
        a_kernel_that_is_off, {}, DirectionsError,
        r"it computes other directions than the server \(add on float32\): update .* or set device = cpu",
    ),
    "another seed": (nothing_else, {"seed": 12}, MismatchError, r"its pool of directions is another one \(give both"),
    "another family": (nothing_else, {"family": "rademacher"}, MismatchError, "its pool of directions is another one"),
    "another K": (nothing_else, {"K": 65}, MismatchError, "its pool of directions is another one"),
    "another dtype": (nothing_else, {"dtype": "bfloat16"}, ModelError, "it holds another base model than the server"),
    "other blocks": (
        nothing_else, {"algorithm": "ferret", "blocks": "tensor", "eps": 5e-4}, ModelError,
        "it divides the parameters into other blocks",
    ),
}  # fmt: skip


def with_client_two(name: str) -> Callable[[Message, Context], Message]:
    """The ClientApp, in which client 2 introduces itself from a machine that differs."""
    around, changes, _, _ = UNFIT[name]

    def handler(message: Message, context: Context) -> Message:
        if message.metadata.message_type != "query" or context.node_config["partition-id"] != 2:
            return client.app.app(message, context)
        context = copy.copy(context)
        context.run_config = {**context.run_config, **changes}
        self_test.cache_clear()
        try:
            with around():
                return client.app.app(message, context)
        finally:
            self_test.cache_clear()

    return handler


@pytest.mark.parametrize("name", UNFIT)
def test_a_client_that_does_not_fit_is_refused_by_name_and_the_run_goes_on_without_it(settings: RunConfig, name: str) -> None:
    said: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note) and event.warning:
            said.append(event.text)

    with listening(listen):
        outcome = run(settings, handler=with_client_two(name))
    assert outcome.folder.read_metrics()[1]["clients"] == ["0", "1", "3"]
    assert not outcome.refused
    refusal = [text for text in said if "Client 2 was refused: " in text]
    assert len(refusal) == 1
    assert re.search(UNFIT[name][3], refusal[0])


@pytest.mark.parametrize("name", UNFIT)
def test_if_it_is_needed_the_run_ends_before_its_first_round(settings: RunConfig, name: str) -> None:
    kind, text = UNFIT[name][2:]
    with pytest.raises(kind, match=text):
        run(settings.replace(clients_per_round=4), handler=with_client_two(name))
    assert RunFolder.open(settings.out).read_metrics() == []


def test_several_reasons_are_said_at_once(settings: RunConfig) -> None:
    def change(partition: int, record: ConfigRecord) -> ConfigRecord:
        test = decode(bytes(record["selftest"]))
        return ConfigRecord({**record, "fingerprint": b"?" * 16, "selftest": encode(replace(test, program="9", pool=b"?" * 8))})

    with pytest.raises(ModelError, match=r"another base model .*; it runs fedtune 9 .*; its pool of directions is another one"):
        run(settings, handler=introducing(change))


def test_an_introduction_without_a_self_test_or_with_a_damaged_one_is_refused(settings: RunConfig) -> None:
    def without(partition: int, record: ConfigRecord) -> ConfigRecord:
        return ConfigRecord({key: value for key, value in record.items() if key != "selftest"})

    with pytest.raises(MismatchError, match=r"it sent no self-test \(install the server's version of fedtune there\)"):
        run(settings, handler=introducing(without))
    settings = settings.replace(out=settings.out + "-2")
    with pytest.raises(MalformedMessageError, match="The self-test has 3 bytes"):
        run(settings, handler=introducing(lambda partition, record: ConfigRecord({**record, "selftest": b"abc"})))


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
    ("broken", "text"),
    [
        ({"examples": 0}, "Client 0 was refused: it says that it has 0 training samples: a whole number"),
        ({"examples": "many"}, "Client 0 was refused: it says that it has str training samples: a whole number"),
        ({"client": 3}, "Node 0 was refused: A client id is 1 to 64 letters"),
    ],
    ids=["no samples", "not a number", "no id"],
)
def test_an_introduction_without_id_or_samples_is_refused(settings: RunConfig, broken: dict[str, object], text: str) -> None:
    with pytest.raises(WireError, match=text):
        run(settings, handler=introducing(lambda partition, record: ConfigRecord({**record, **broken})))


def test_two_nodes_with_one_id_are_told_apart(settings: RunConfig) -> None:
    with pytest.raises(WireError, match="another node is registered under the name '0'"):
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
