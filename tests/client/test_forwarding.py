"""When the ClientApp forwards, what it says to the worker, and that forwarding imports no torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client import messages
from client.app import identity, seconds_left, trainer
from client.forwarder import Forwarder
from client.generate import GENERATED, generate
from client.pools import KeptPools
from client.worker import Worker
from fedtune.config import RunConfig
from fedtune.errors import ConfigError, FedtuneError
from simulations.engines.local_grid import LocalGrid

ROOT = Path(__file__).parents[2]
SETTINGS = {"device": "cpu", "rounds": 3}
Node = dict[str, bool | int | float | str]


@pytest.fixture(autouse=True)
def _grid() -> None:
    """Flower's messages want an identity of the running task, which a grid gives."""
    LocalGrid(lambda message, context: message, 1, SETTINGS)


def message(ttl: float = 100.0) -> Message:
    return Message(RecordDict({"fedtune": ConfigRecord({"payload": b""})}), dst_node_id=5, message_type="train", ttl=ttl)


def context(node: Node) -> Context:
    return Context(run_id=7, node_id=5, node_config=node, state=RecordDict(), run_config=dict(SETTINGS))


@pytest.mark.parametrize(
    ("program", "node", "kind"),
    [
        ("/venv/bin/flwr-clientapp", {"client-id": "a"}, Forwarder),
        ("/venv/bin/flwr-clientapp", {"partition-id": 0, "num-partitions": 2}, Forwarder),
        ("/venv/bin/flwr-clientapp", {"worker": "off"}, Worker),
        ("/venv/bin/fedtune", {"partition-id": 0, "num-partitions": 2}, Worker),
        ("/venv/bin/pytest", {"client-id": "a"}, Worker),
        ("/venv/bin/fedtune", {"worker": "auto"}, Forwarder),
        ("", {"worker": "unix:/run/x/y.sock"}, Forwarder),
    ],
)
def test_who_does_the_work(program: str, node: Node, kind: type, monkeypatch: pytest.MonkeyPatch, workers: Path) -> None:
    monkeypatch.setattr("sys.argv", [program])
    assert type(trainer(message(), context(node))) is kind
    assert list(workers.iterdir()) == []


def test_a_simulation_never_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither engine runs a client under the name of Flower's program for one message."""
    seen: list[type] = []

    def handler(message: Message, context: Context) -> Message:
        seen.append(type(trainer(message, context)))
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid(handler, 3, SETTINGS)
    grid.push_messages([Message(RecordDict(), dst_node_id=node, message_type="train") for node in grid.get_node_ids()])
    assert seen == [Worker] * 3


@pytest.mark.parametrize("idle", [0, -1, "soon", True])
def test_an_idle_time_that_is_none_is_refused(idle: bool | int | str, workers: Path) -> None:
    with pytest.raises(ConfigError, match="a number of seconds above 0 was expected"):
        trainer(message(), context({"worker": "auto", "worker-idle": idle}))


def test_paths_are_absolute_for_a_process_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("ROWS", "rows.jsonl")
    node: Node = {"worker": "auto", "model": "model", "data": "${ROWS}", "client-id": "a"}
    forwarder = trainer(message(), context(node))
    assert isinstance(forwarder, Forwarder)
    assert forwarder.config.model == str(tmp_path / "model")
    assert identity(context(node)).data == str(tmp_path / "rows.jsonl")
    assert forwarder.run == "7"


def test_the_deadline_is_that_of_the_message_unless_the_clocks_differ() -> None:
    now = time.time()
    for age, expected in ((40.0, 60.0), (-30.0, 100.0), (500.0, 100.0)):
        one = message()
        one.metadata.created_at = now - age
        assert seconds_left(one) == pytest.approx(expected, abs=5.0)


def test_forwarding_imports_no_torch() -> None:
    code = (
        "import sys, client.app, client.forwarder, client.service\n"
        "print([name for name in ('torch', 'transformers', 'numba', 'safetensors', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_settings_survive_the_way_to_the_worker() -> None:
    config = RunConfig(seed=2**63 - 1, lr=1e-17, trust_remote_code=True, template="plain", instruction_column="Übung")
    sent = [type(one).FromString(one.SerializeToString()) for one in messages.settings_of(config)]
    assert messages.config_of(sent, messages.settings_digest(config)) == config


def test_a_made_up_error_type_is_not_trusted() -> None:
    for kind in ("annotations", "SystemExit", ""):
        assert type(messages.error_of(messages.pb.Problem(kind=kind, text="x"))) is FedtuneError


def test_kept_pools_make_room() -> None:
    pools = KeptPools(most_clients=3, most_bytes=100)
    for client in "abc":
        pools.keep("1", client, [bytes(30)])
    pools.keep("1", "a", [bytes(31)])
    pools.keep("1", "d", [bytes(30)])
    assert [len(pools.of("1", client)) for client in "abcd"] == [1, 0, 1, 1]
    pools.keep("2", "a", [bytes(60), bytes(10)])
    assert [len(pools.of("1", client)) for client in "abcd"] == [0, 0, 0, 1]
    assert pools.of("2", "a") == [bytes(60), bytes(10)]
    pools.keep("3", "x", [bytes(101)])
    assert pools.of("3", "x") == []


@pytest.mark.filterwarnings("ignore:pkg_resources is deprecated")
def test_the_generated_files_are_those_of_the_contract(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    generate(tmp_path)
    for name in GENERATED:
        assert (tmp_path / "client" / name).read_bytes() == (ROOT / "client" / name).read_bytes(), "python -m client.generate"
