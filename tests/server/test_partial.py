"""Partial participation: more clients than needed, prefixes of the local steps, too few replies, failures by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Message

import fedtune.algorithms.base
import server.exchange
import server.strategy
from fedtune import wire
from fedtune.algorithms import ALGORITHMS as RECORDS
from fedtune.config import RunConfig
from fedtune.errors import ContradictionError, DivergedError
from fedtune.ledger import Ledger, Used
from fedtune.progress import ClientStep, Event, listening
from fedtune.replay import Rules, read_update, restore
from fedtune.verify import verify
from server.sampling import sample_clients
from server.strategy import working_seconds
from simulations.engines.local_grid import Faults
from tests.laws.federation import SETTINGS, config, payload_of, run

Settings = Callable[..., RunConfig]


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Settings:
    def build(name: str = "fedkseed", **changes: object) -> RunConfig:
        quick = {"eval_samples": 4, "eval_every": 0, **changes}
        return config(name, tiny_folder, instructions, tmp_path / str(quick.pop("out", "run")), **quick)

    return build


@pytest.fixture(autouse=True)
def _time_flies_while_the_server_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has not come when the server would wait for it comes too late."""
    ahead = [0.0]

    def sleep(seconds: float) -> None:
        ahead[0] += 1e6

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], sleep=sleep)
    monkeypatch.setattr(server.exchange, "time", clock)


def lost(*lost_rounds: int, of: int = 4) -> Faults:
    """Every message of these rounds is lost, but for the first `4 - of` of each."""
    counts: dict[str, int] = {}

    def drop(message: Message) -> bool:
        group = message.metadata.group_id
        counts[group] = counts.get(group, 0) + 1
        return message.metadata.message_type == "train" and int(group) in lost_rounds and counts[group] > 4 - of

    return Faults(drop=drop)


# ---------------------------------------------------------------------------------------------------- over-selection


def test_over_selection_asks_more_and_never_more_than_there_are() -> None:
    base = RunConfig(clients=10, clients_per_round=4)
    assert [base.replace(over_selection=share).invited_per_round for share in (0.0, 0.1, 0.25, 0.5, 9.0)] == [4, 5, 5, 6, 10]
    ten = {str(client): 1 for client in range(10)}
    assert len(sample_clients(base.replace(over_selection=0.5), 1, ten)) == 6


def test_all_that_answer_in_time_are_used(settings: Settings) -> None:
    outcome = run(settings(clients_per_round=2, over_selection=1.0, rounds=1))
    with Ledger.open(outcome.folder.path) as ledger:
        assert len(ledger.updates(1)) == 4


def test_the_digest_depends_only_on_which_updates_were_used(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four were asked and two were lost; then only the other two are asked, and nothing is lost."""
    some = run(settings(clients_per_round=2, over_selection=1.0, rounds=1), lost(1, of=2))
    with Ledger.open(some.folder.path) as ledger:
        used = tuple(update.client for update in ledger.updates(1))
    assert len(used) == 2
    monkeypatch.setattr(server.strategy, "sample_clients", lambda *_: used)
    assert run(settings(out="only", rounds=1)).digests == some.digests


# ---------------------------------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "ferret-official"])
def test_a_deadline_returns_the_steps_that_are_done(name: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps after two steps: the update is the one of a run with two steps, but weighted as a half."""
    now = [0.0]
    monkeypatch.setattr(fedtune.algorithms.base, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def late_after_two(event: Event) -> None:
        now[0] = 1e12 if isinstance(event, ClientStep) and event.step >= 2 else 0.0

    with listening(late_after_two):
        outcome = run(settings(name, rounds=1, local_steps=4, round_timeout=600.0))
    assert not outcome.refused
    whole = run(settings(name, out="two", rounds=1, local_steps=2))
    with Ledger.open(outcome.folder.path) as ledger, Ledger.open(whole.folder.path) as two:
        assert verify(ledger).rounds == 1
        steps = [_steps(ledger, update) for update in ledger.updates(1)]
        assert steps == [2] * settings(name).invited_per_round
        if RECORDS[SETTINGS[name]["algorithm"]].kind == wire.Kind.SCALARS and name != "fedkseed-two":
            assert [u.payload for u in ledger.updates(1)] == [u.payload for u in two.updates(1)]
    assert outcome.digests[1] != outcome.digests[0]


def _steps(ledger: Ledger, used: Used) -> int:
    rules = Rules.of(ledger.header)
    state = rules.start()
    return read_update(rules, state, used.payload, round=1, digest=rules.digest(state), client=used.client).steps


def test_a_client_is_told_to_stop_a_little_before_the_server_does(settings: Settings) -> None:
    told: list[float] = []

    def tamper(message: Message, reply: Message) -> Message:
        if payload_of(message) is not None:
            told.append(float(str(message.content.config_records["fedtune"]["seconds"])))
        return reply

    run(settings(rounds=1, round_timeout=10.0), Faults(tamper=tamper))
    assert told == [9.0] * 3
    assert working_seconds(RunConfig(round_timeout=3600.0)) == 3570.0


# ---------------------------------------------------------------------------------------------------- too few replies


def test_a_short_round_changes_nothing_and_is_skipped(settings: Settings) -> None:
    outcome = run(settings(min_replies=2, rounds=3), lost(2, of=3))
    assert outcome.digests[2] == outcome.digests[1] != outcome.digests[3]
    with Ledger.open(outcome.folder.path) as ledger:
        assert verify(ledger).updates == 6
        refused = ledger.round(2).refused
    assert sorted(refused.values())[0].startswith("no answer within 3600 s")
    assert sorted(refused.values())[2] == "not used: 1 usable updates came, a round needs 2"


def test_a_short_round_is_repeated_with_other_clients_until_it_is_not(settings: Settings) -> None:
    """The first two tries at round 2 lose everything; the run ends as long as one in which nothing was lost."""
    tries: list[int] = []

    def drop(message: Message) -> bool:
        if message.metadata.message_type != "train" or message.metadata.group_id != "2":
            return False
        tries.append(message.metadata.dst_node_id)
        return len(tries) <= 4

    once = settings(short_round="repeat", clients_per_round=2, rounds=3)
    outcome = run(once, Faults(drop=drop))
    assert len(set(outcome.digests)) == 4
    with Ledger.open(outcome.folder.path) as ledger:
        assert verify(ledger).rounds == 3
        assert ledger.round(2).attempt == 3
        attempts = list(ledger.events("attempt"))
        assert [event.detail["round"] for event in attempts] == [2, 2]
        assert ledger.round(2).total.messages_down == 6
        assert ledger.round(2).clients == sample_clients(once, 2, {str(client): 1 for client in range(4)}, 3)


def test_three_short_rounds_or_tries_end_the_run_and_a_resume_goes_on(settings: Settings) -> None:
    once = settings(short_round="repeat", min_replies=3, rounds=2)
    with pytest.raises(DivergedError, match=r"Fewer than 3 clients .* for 3 tries at a round\. .*client 1: "):
        run(once, lost(2, of=2))
    again = run(once.replace(resume=once.out))
    assert len(set(again.digests)) == 3
    with Ledger.open(again.folder.path) as ledger:
        assert ledger.round(2).attempt == 4
        restore(ledger, Rules.of(ledger.header))


def test_more_replies_than_clients_are_a_contradiction() -> None:
    with pytest.raises(ContradictionError, match=r"min_replies = 5 but a round asks 4 clients"):
        RunConfig(clients=8, clients_per_round=4, min_replies=5)
    assert RunConfig(clients=8, clients_per_round=4, over_selection=0.25, min_replies=5).needed_replies == 5


def test_failures_are_reported_by_client(settings: Settings) -> None:
    """One never answers, one sends garbage, one crashes, one is fine."""
    seen: list[int] = []

    def place(message: Message) -> int:
        if message.metadata.dst_node_id not in seen:
            seen.append(message.metadata.dst_node_id)
        return seen.index(message.metadata.dst_node_id)

    def drop(message: Message) -> bool:
        return message.metadata.message_type == "train" and place(message) == 0

    def tamper(message: Message, reply: Message) -> Message:
        from tests.laws.federation import with_payload

        return with_payload(reply, b"garbage") if payload_of(reply) and place(message) == 1 else reply

    outcome = run(settings(clients_per_round=4, rounds=1), Faults(drop=drop, tamper=tamper))
    refused = outcome.folder.read_metrics()[1]["refused"]
    assert len(refused) == 2
    kinds = sorted(reason.split(" ")[0] for reason in refused.values())
    assert kinds == ["MalformedMessageError:", "no"]
