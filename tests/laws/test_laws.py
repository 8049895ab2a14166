"""Every algorithm x every law (the invariants that make a federation trustworthy), on a real tiny Llama.

Each law runs through the same ServerApp, ClientApp and message bytes as a deployment.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

import client.app
import fedtune.resident
from client.worker import Identity, Worker
from fedtune import wire
from fedtune.algorithms import ALGORITHMS as RECORDS
from fedtune.coefficients import Coefficients
from fedtune.config import RunConfig
from fedtune.errors import DivergedError, FedtuneError, Interrupted, MismatchError, UnchangedError
from fedtune.evaluation import response_loss
from fedtune.ledger import Ledger
from fedtune.progress import ClientStep, Event, clear_stop, listening, request_stop
from fedtune.resident import Resident, release, resident
from fedtune.run_folder import RunFolder
from fedtune.verify import verify
from fedtune.wire import Kind
from simulations.engines.local_grid import Faults, LocalGrid
from tests.laws.federation import ALGORITHMS, SETTINGS, config, lying, payload_of, run, with_payload

pytestmark = pytest.mark.parametrize("name", ALGORITHMS)


@pytest.fixture
def settings(name: str, tiny_folder: Path, instructions: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def build(**changes: object) -> RunConfig:
        return config(name, tiny_folder, instructions, Path(str(changes.pop("out", tmp_path / "run"))), **changes)

    return build


def state_of(folder: RunFolder, here: Resident) -> Coefficients:
    """The model of a run folder, decoded from its bytes."""
    settings, layout = folder.config(), here.replica.layout
    algorithm = here.algorithm
    complete = wire.decode_instruction(
        folder.read_bytes("coefficients.bin"),
        lambda number: algorithm.pool(settings, layout, number),
        lambda round: settings.rounds + 1,
        layout.blocks,
        settings.coefficient_bits,
    )
    return Coefficients(complete.pools)


def finest(name: str) -> dict[str, object]:
    """The finest grid, and a client that there is."""
    only = {"only_client": ""} if name == "local" else {}
    return {"coefficient_bits": 24, **only}


def weights_of(here: Resident) -> list[bytes]:
    return [weight.detach().numpy().tobytes() for weight in here.replica.weights]


# ---------------------------------------------------------------------------------------------------- law 1


def test_perturbing_restores_the_weights(settings: Callable[..., RunConfig]) -> None:
    """Also when the loss raises half way through the forward pass."""
    here = resident(settings())
    before = weights_of(here)
    directions = here.replica.directions(here.algorithm.pool(settings(), here.replica.layout, 0))
    tokens = torch.tensor([[1, 2, 3]])
    last = directions.pool.size - 1  # of axes: an output weight, which every prediction depends on
    with torch.no_grad(), here.replica.perturbation.at(directions, last, 0.1):
        changed = here.replica.model(input_ids=tokens).logits
    assert weights_of(here) == before
    with torch.no_grad():
        assert not torch.equal(changed, here.replica.model(input_ids=tokens).logits)
    broken = torch.tensor([[10**6]])
    with pytest.raises(IndexError), torch.no_grad(), here.replica.perturbation.at(directions, last, 0.1):
        here.replica.model(input_ids=broken)
    assert weights_of(here) == before


# ---------------------------------------------------------------------------------------------------- law 2


def test_replay_equals_live_and_late_join_equals_always_there(settings: Callable[..., RunConfig]) -> None:
    """A process that was never there rebuilds the final model from one message, bit by bit."""
    outcome = run(settings())
    live = resident(settings())
    live.replica.become(state_of(outcome.folder, live))
    there = weights_of(live)
    release()
    late = resident(settings())
    assert late is not live
    digest = late.replica.become(state_of(outcome.folder, late))
    assert digest.hex() == outcome.summary["digest"]
    assert weights_of(late) == there
    assert weights_of(late) != weights_of(Resident(settings()))


def test_a_clients_own_model_is_what_the_server_rebuilds(settings: Callable[..., RunConfig], name: str) -> None:
    """One client, finest grid: the weights it trained equal base plus coefficients, or point there (Ferret)."""
    plain = {"update_rounding": "nearest"} if SETTINGS[name].get("update_rounding") == "stochastic" else {}
    only = settings(clients=1, clients_per_round=1, rounds=1, scalar_bits=32, server_lr=1.0, **finest(name), **plain)
    base = [weight.detach().clone() for weight in resident(only).replica.weights]
    trained: list[torch.Tensor] = []

    def handler(message: Message, context: Context) -> Message:
        reply = client.app.app(message, context)
        trained[:] = [weight.detach().clone() for weight in resident(only).replica.weights]
        return reply

    outcome = run(only, handler=handler)
    here = resident(only)
    here.replica.touch()
    here.replica.become(state_of(outcome.folder, here))
    live = torch.cat([(a - b).reshape(-1) for a, b in zip(trained, base, strict=True)])
    rebuilt = torch.cat([(a.detach() - b).reshape(-1) for a, b in zip(here.replica.weights, base, strict=True)])
    if SETTINGS[name]["algorithm"] != "ferret":
        assert float((live - rebuilt).norm() / live.norm()) < 1e-3
    else:
        assert float(torch.dot(live, rebuilt)) > 0.0


def test_a_client_that_missed_rounds_or_restarted_catches_up(settings: Callable[..., RunConfig]) -> None:
    expected = run(settings()).summary["digest"]
    lost: list[object] = []

    def forgetful(message: Message, context: Context) -> Message:
        lost.append(context.state.config_records.pop("fedtune", None))
        return client.app.app(message, context)

    again = run(settings(out=settings().out + "-2"), handler=forgetful)
    assert again.summary["digest"] == expected
    assert not again.refused
    assert any(record is not None for record in lost)


# ---------------------------------------------------------------------------------------------------- law 3


def test_order_of_arrival_does_not_matter(settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(settings()).digests
    pull = LocalGrid.pull_messages
    monkeypatch.setattr(LocalGrid, "pull_messages", lambda self, ids: list(reversed(pull(self, sorted(ids)))))
    assert run(settings(out=settings().out + "-2")).digests == expected


def test_an_empty_round_leaves_the_state(settings: Callable[..., RunConfig]) -> None:
    def lost(message: Message) -> bool:
        return message.metadata.group_id == "2"

    outcome = run(settings(round_timeout=1.5), Faults(drop=lost))
    assert outcome.digests[2] == outcome.digests[1]
    assert outcome.digests[3] != outcome.digests[2]
    assert len(outcome.refused) == settings().invited_per_round
    assert all("no answer within 1.5 s" in problem for problem in outcome.refused.values())


# ---------------------------------------------------------------------------------------------------- law 4


def spoil_nan(payload: bytes) -> bytes:
    return payload[:-4] + np.array([np.nan], dtype="<f4").tobytes()


HOSTILE: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "no payload": (lambda payload: None, "MalformedMessageError: The reply carries no payload"),
    "garbage": (lambda payload: b"\x93garbage" * 5, "MalformedMessageError: This is not a fedtune message"),
    "truncated": (lambda payload: payload[:-1], "MalformedMessageError"),
    "oversized": (lambda payload: payload + b"\0" * 100_000, "MalformedMessageError"),
    "NaN": (spoil_nan, "NonFiniteError"),
    "old round": (lambda payload: payload[:4] + b"\x07\0\0\0" + payload[8:], "MismatchError: The update is for round 7"),
    "other model": (
        lambda payload: payload[:8] + b"?" * 16 + payload[24:],
        "MismatchError: The update starts from another model, round or client",
    ),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_update_is_refused_named_and_changes_nothing(settings: Callable[..., RunConfig], attack: str) -> None:
    """The same run with the hostile client's messages dropped ends at the same digest."""
    change, text = HOSTILE[attack]
    asked = settings(rounds=1, scalar_bits=32)
    lies, silence = lying(change)
    if asked.alone:  # nobody else moves the model, so the run ends with the reason
        with pytest.raises(FedtuneError) as ended:
            run(asked, lies)
        said = f"{type(ended.value).__name__}: {ended.value}"
        assert all(part in said for part in text.split(": "))
        return
    attacked = run(asked, lies)
    assert next(iter(attacked.refused.values())).startswith(text)
    assert len(attacked.refused) == 1
    assert attacked.summary["updates_refused"] == 1
    without = run(asked.replace(out=asked.out + "-2", round_timeout=1.5), silence)
    assert attacked.digests == without.digests


def huge(payload: bytes, blocks: int) -> bytes:
    """Every number is 3e38 (32 bits); the counts of `blocks` blocks stay."""
    start = 37 + 2 * blocks
    return payload[:start] + np.full((len(payload) - start) // 4, 3e38, dtype="<f4").tobytes()


def test_one_clients_huge_numbers_are_refused_by_name_and_the_others_count(
    settings: Callable[..., RunConfig], name: str
) -> None:
    """They are finite, but the model would not be: the digest is that of the round without this client."""
    asked = settings(rounds=1, scalar_bits=32)
    layout = resident(asked).replica.layout
    own = RECORDS[asked.algorithm].kind == Kind.COORDINATES and asked.coordinates == "own"
    lies, silence = lying(lambda payload: huge(payload, layout.blocks if own else 0))
    too_large = r"NonFiniteError: it moves a coefficient by \d(\.\d+)?e\+3\d, and with it the model does not fit"
    if asked.alone:  # nobody is left to count
        with pytest.raises(UnchangedError, match=too_large):
            run(asked, lies)
        return
    attacked = run(asked, lies)
    with Ledger.open(attacked.folder.path) as ledger:
        assert verify(ledger).digest == attacked.digests[-1]
    if name == "ferret-official":  # which clips what each coordinate moves, as its code does
        assert not attacked.refused
        return
    ((_, reason),) = attacked.refused.items()
    assert re.match(too_large, reason)
    without = run(asked.replace(out=asked.out + "-2", round_timeout=1.5), silence)
    assert attacked.digests == without.digests


def test_an_update_of_another_client_of_the_round_is_refused_by_name(settings: Callable[..., RunConfig]) -> None:
    """The first answer of a round, sent by all: it counts for the client that made it."""
    asked = settings(rounds=1, clients_per_round=4)
    first: list[bytes] = []

    def tamper(message: Message, reply: Message) -> Message:
        payload = payload_of(reply)
        if payload is None or message.metadata.message_type != "train":
            return reply
        first.append(payload)
        return with_payload(reply, first[0])

    outcome = run(asked, Faults(tamper=tamper))
    assert len(outcome.refused) == asked.invited_per_round - 1
    assert all(why.startswith("MismatchError: It is the update of client 0") for why in outcome.refused.values())


def test_a_replayed_update_is_refused(settings: Callable[..., RunConfig]) -> None:
    """A valid answer of round 1, sent again in round 2."""
    recorded: dict[int, bytes] = {}

    def tamper(message: Message, reply: Message) -> Message:
        payload = payload_of(reply)
        if payload is None or message.metadata.message_type != "train":
            return reply
        if message.metadata.group_id == "1":
            recorded[message.metadata.dst_node_id] = payload
            return reply
        old = recorded.get(message.metadata.dst_node_id)
        return with_payload(reply, old) if old and message.metadata.group_id == "2" else reply

    asked = settings(rounds=2, clients_per_round=4)
    outcome = run(asked, Faults(tamper=tamper))
    assert len(outcome.refused) == asked.invited_per_round
    assert all("round 1; this is round 2" in problem for problem in outcome.refused.values())
    assert outcome.digests[2] == outcome.digests[1]


def test_a_loss_that_is_not_finite_is_reported_and_poisons_nothing(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect elsewhere: an infinite loss becomes NaN weights, in the client and then in the global model."""
    monkeypatch.setattr(fedtune.resident, "response_loss", lambda model, batch: response_loss(model, batch) * float("inf"))
    with pytest.raises(DivergedError, match=f"not finite after 0 of {settings().client_steps} steps"):
        run(settings(rounds=5))
    rows = RunFolder.open(settings().out).read_metrics()
    assert len(rows) == 4
    assert len({row["digest"] for row in rows}) == 1
    assert all(row["eval_loss"] == rows[0]["eval_loss"] for row in rows)


# ---------------------------------------------------------------------------------------------------- law 5


def test_same_seed_same_digest_other_seed_other_digest(settings: Callable[..., RunConfig]) -> None:
    first = run(settings())
    release()
    assert run(settings(out=settings().out + "-2")).digests == first.digests
    assert run(settings(out=settings().out + "-3", seed=12)).summary["digest"] != first.summary["digest"]
    assert len(set(first.digests)) == 4


def test_a_stop_keeps_what_is_finished(settings: Callable[..., RunConfig]) -> None:
    def stop_in_round_two(event: Event) -> None:
        if isinstance(event, ClientStep) and len(RunFolder.open(settings().out).read_metrics()) == 2:
            request_stop()

    try:
        with listening(stop_in_round_two), pytest.raises(Interrupted):
            run(settings())
    finally:
        clear_stop()
    stopped = [row["digest"] for row in RunFolder.open(settings().out).read_metrics()]
    assert run(settings(out=settings().out + "-2")).digests[:2] == stopped


def test_the_worker_refuses_another_model(settings: Callable[..., RunConfig]) -> None:
    asked = settings()
    here = resident(asked)
    strategy_bytes = run(asked).folder.read_bytes("coefficients.bin")
    forged = strategy_bytes[:8] + b"?" * 16 + strategy_bytes[24:]
    before = weights_of(here)
    with pytest.raises(MismatchError, match="another base model"):
        Worker(asked.replace(rounds=5)).train(Identity("0"), forged, [])
    assert weights_of(here) == before
