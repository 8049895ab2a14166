"""Many clients on the in-process engine: a tenth of them killed at random, and what a message costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, Message

import server.app
import server.strategy
from fedtune.config import RunConfig
from fedtune.ledger import Ledger
from fedtune.progress import Event, RoundStarted, listening
from fedtune.run_folder import RunFolder
from fedtune.seeds import Stream
from fedtune.verify import verify
from simulations.engines.local_grid import LocalGrid
from simulations.overhead import measure
from simulations.pretend import PretendClient

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ROUNDS, CLIENTS, ASKED = 100, 100, 10


class KilledError(Exception):
    """What the engine reports for a client whose process is gone."""


def federation(settings: RunConfig, handler: Callable[[Message, Context], Message]) -> list[str]:
    """Run to the end; the digests of all rounds."""
    grid = LocalGrid(handler, settings.clients, settings.as_mapping(), seed=settings.seed)
    server.app.app(grid, grid.server_context())
    return [row["digest"] for row in RunFolder.open(settings.out).read_metrics()]


def test_a_tenth_killed_at_random_and_the_server_too_ends_like_the_same_schedule_without_kills(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 clients, 100 rounds of 10. The other run asks only those whose updates were used, and nobody dies in it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"instruction": "say {row}", "output": "{row}"}}\n' for row in range(300)))
    settings = RunConfig(
        model=str(tiny_folder), data=str(rows), category_column="", clients=CLIENTS, clients_per_round=ASKED, rounds=ROUNDS,
        local_steps=5, K=64, lr=1e-4, min_samples=1, eval_every=0, eval_samples=1, device="cpu", threads=1,
        out=str(tmp_path / "killed"),
    )  # fmt: skip
    pretend = PretendClient(settings)

    def killed(message: Message, context: Context) -> Message:
        number, client = int(message.metadata.group_id or 0), int(context.node_config["partition-id"])
        if number and Stream(3, "kill", number, client).below(10, 1)[0] == 0:
            raise KilledError("the process is gone")
        return pretend(message, context)

    def power_cut(event: Event) -> None:
        if isinstance(event, RoundStarted) and event.round in (31, 62) and event.round not in cut:
            cut.append(event.round)
            raise KeyboardInterrupt

    cut: list[int] = []
    for resume in ("", settings.out):
        with listening(power_cut), pytest.raises(KeyboardInterrupt):
            federation(settings.replace(resume=resume), killed)
    with_kills = federation(settings.replace(resume=settings.out), killed)
    with Ledger.open(Path(settings.out)) as ledger:
        used = {row.number: tuple(u.client for u in ledger.updates(row.number)) for row in ledger.rounds()}
        lost = sum(len(row.refused) for row in ledger.rounds())
        assert verify(ledger).updates == ROUNDS * ASKED - lost
    assert 70 <= lost <= 130
    monkeypatch.setattr(server.strategy, "sample_clients", lambda config, number, *_: used[number])
    without = settings.replace(out=str(tmp_path / "without"))
    assert federation(without, pretend) == with_kills
    assert RunFolder.open(without.out).summary()["updates_refused"] == 0
    assert len(set(with_kills)) == ROUNDS + 1


def test_the_engine_costs_less_than_50_milliseconds_a_message_with_a_thousand_clients(tmp_path: Path) -> None:
    """CPU time, since wall time depends on what else the machine does."""
    found = measure(clients=1000, rounds=10, asked=10, folder=tmp_path)
    print(found)
    assert found.messages == 100
    assert found.cpu_ms < 50.0
