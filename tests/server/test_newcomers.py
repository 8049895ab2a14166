"""Clients that connect for the first time, or again as another node, while the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, Message

import client.app
import server.app
from fedtune.config import RunConfig
from fedtune.errors import ContradictionError, RunError
from fedtune.progress import Event, Note, listening
from fedtune.resident import release
from fedtune.run_folder import RunFolder
from simulations.engines.local_grid import LocalGrid
from tests.laws.federation import config, payload_of

LATE = 5  # the round in which the last client comes


class CountingGrid(LocalGrid):
    """Knows the round."""

    round = 0

    def push_messages(self, messages: object) -> list[str]:
        batch = list(messages)  # type: ignore[call-overload]
        self.round = max([self.round, *(int(message.metadata.group_id or 0) for message in batch)])
        return super().push_messages(batch)


class LateGrid(CountingGrid):
    """The node of client 1 connects between the rounds LATE - 1 and LATE."""

    def get_node_ids(self) -> list[int]:
        nodes = super().get_node_ids()
        return [n for n in nodes if self.contexts[n].node_config["partition-id"] != 1 or self.round >= LATE - 1]


def of_no_use_before(message: Message, context: Context) -> Message:
    """A ClientApp whose client 1 fails in the rounds before LATE."""
    early = payload_of(message) is not None and int(message.metadata.group_id) < LATE
    if early and context.node_config["partition-id"] == 1:
        raise RuntimeError("not there")
    return client.app.app(message, context)


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> RunConfig:
    return config("fedkseed", tiny_folder, instructions, tmp_path / "run", rounds=10, clients_per_round=4, eval_every=0)


def go(settings: RunConfig, grid: LocalGrid) -> list[dict[str, object]]:
    server.app.app(grid, grid.server_context())
    return RunFolder.open(settings.out).read_metrics()


def test_a_client_that_was_never_there_joins_in_round_five_of_ten(settings: RunConfig, tmp_path: Path) -> None:
    """It trains the server's model at once: the digests are those of a run whose client 1 was of no use before."""
    always = settings.replace(out=str(tmp_path / "always"))
    expected = go(always, LocalGrid(of_no_use_before, 4, always.as_mapping()))
    release()
    late = settings.replace(min_clients=3)
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    with listening(listen):
        rows = go(late, LateGrid(client.app.app, 4, late.as_mapping()))
    assert [row["clients"] for row in rows[1:]] == [["0", "2", "3"]] * (LATE - 1) + [["0", "1", "2", "3"]] * 6
    assert all(row["refused"] == {} for row in rows)
    assert [row["digest"] for row in rows] == [row["digest"] for row in expected]
    assert notes.count("Client 1 joins the run.") == 1


def test_without_min_clients_the_run_waits_for_all(settings: RunConfig) -> None:
    waiting = settings.replace(wait_timeout=0.2)
    with pytest.raises(RunError, match="3 of 4 nodes connected within"):
        go(waiting, LateGrid(client.app.app, 4, waiting.as_mapping()))
    with pytest.raises(ContradictionError, match="min_clients = 5"):
        settings.replace(min_clients=5)


class MovingGrid(CountingGrid):
    """Client 0 comes back as another node after round 2: the first node goes, the last one, with its id, connects.

    Without keys, as in a deployment without node authentication, where a node has another id at each start.
    """

    def get_node_ids(self) -> list[int]:
        first, *others, last = super().get_node_ids()
        return [*others, last] if self.round >= 2 else [first, *others]


def test_a_client_may_come_back_as_another_node(settings: RunConfig) -> None:
    moving = settings.replace(rounds=4, clients=4, clients_per_round=3, min_clients=3)
    again = {3: {"client-id": "0", "partition-id": 0}}
    grid = MovingGrid(client.app.app, 4, moving.as_mapping(), node_configs=again, registered=False)
    rows = go(moving, grid)
    assert [row["clients"] for row in rows[1:]] == [["0", "1", "2"]] * 4
    assert all(row["refused"] == {} for row in rows)
