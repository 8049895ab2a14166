"""The methods to compare with, against plain training loops, and what each of them sends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune.algorithms import ALGORITHMS
from fedtune.algorithms.base import server_rate
from fedtune.algorithms.decomfl import aggregate as decomfl_aggregate
from fedtune.algorithms.fedzo import own_pool
from fedtune.apply import apply_delta
from fedtune.coefficients import Coefficients, quantise
from fedtune.config import RunConfig
from fedtune.data.batches import Batch
from fedtune.directions import Pool
from fedtune.directions.oracle import dense
from fedtune.errors import ModelError, RunError, RunFolderError
from fedtune.estimate import estimate_run
from fedtune.evaluation import response_loss
from fedtune.export import delta_of_run, export_delta, export_run, load_tuned
from fedtune.layout import Layout, base_size, fingerprint
from fedtune.replica import Replica
from fedtune.resident import Resident, release
from fedtune.wire import Status, Update
from tests.laws.federation import config, run

Settings = Callable[..., RunConfig]


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Settings:
    def build(name: str, **changes: object) -> RunConfig:
        return config(name, tiny_folder, instructions, tmp_path / str(changes.pop("out", "run")), **changes)

    return build


def tuned(asked: RunConfig) -> torch.Tensor:
    """The weights that a run leads to, flat."""
    lm, _, _ = load_tuned(run(asked).folder)
    return flat([p for p in lm.model.parameters() if p.requires_grad])


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1).clone() for tensor in tensors])


def batches_of(here: Resident, asked: RunConfig, samples: Sequence[Any], round: int, client: str, count: int) -> list[Batch]:
    """The batches of a client and round in order."""
    batches = here.batches(asked, client, samples, round)
    return [next(batches) for _ in range(count)]


def trained(asked: RunConfig, samples: Callable[[Resident], Sequence[Any]], client: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, base weights) of torch's own optimiser on one party's batches, which starts afresh every round."""
    here = Resident(asked)
    model, weights = here.replica.model, here.replica.weights
    base = flat(weights)
    for round in range(1, asked.rounds + 1):
        optimiser = torch.optim.SGD(weights, lr=asked.lr)
        for batch in batches_of(here, asked, samples(here), round, client, asked.client_steps):
            optimiser.zero_grad()
            response_loss(model, batch).backward()
            optimiser.step()
    return flat(weights), base


# ---------------------------------------------------------------------------------------------------- first order


@pytest.mark.parametrize(("bits", "error"), [(32, 1e-6), (16, 4e-3)])
def test_fedavg_with_one_client_is_that_clients_training(settings: Settings, bits: int, error: float) -> None:
    """At 16 bits up (bfloat16) and down (a grid of 2^-15 of the largest change), to 0.4 % of the change."""
    asked = settings("fedavg", clients=1, clients_per_round=1, scalar_bits=bits, coefficient_bits=bits)
    expected, base = trained(asked, lambda here: here.data.clients[0], "0")
    moved = (expected - base).norm()
    assert float((tuned(asked) - expected).norm() / moved) < error


def test_local_is_one_clients_training(settings: Settings) -> None:
    asked = settings("local", only_client="2")
    expected, base = trained(asked, lambda here: here.data.clients[2], "2")
    assert float((tuned(asked) - expected).norm() / (expected - base).norm()) < 1e-6


def test_central_trains_on_the_data_of_all_as_long_as_all_do(settings: Settings) -> None:
    asked = settings("central", rounds=2)
    assert asked.client_steps == 3 * asked.local_steps
    expected, base = trained(asked, lambda here: [sample for own in here.data.clients for sample in own], "0")
    assert float((tuned(asked) - expected).norm() / (expected - base).norm()) < 1e-6


@pytest.mark.parametrize("name", ["local", "central"])
def test_the_bounds_send_nothing(settings: Settings, name: str) -> None:
    summary = run(settings(name)).summary
    assert [summary[f"payload_bytes_{way}"] for way in ("up", "down")] == [0, 0]
    assert summary["clients_per_round"] == 1
    release()
    assert estimate_run(settings(name)).payload == 0


def test_a_client_that_is_not_there_cannot_train_alone(settings: Settings) -> None:
    with pytest.raises(RunError, match=r"only_client = '9' is none of the clients \(0, 1, 2, 3\): name one of them"):
        run(settings("local", only_client="9"))


def test_the_mean_of_two_clients_is_that_of_their_models() -> None:
    layout, record = Layout.from_shapes([("a", (2, 3)), ("b", (4,))]), ALGORITHMS["fedavg"]
    asked = RunConfig(algorithm="fedavg", server_lr=0.5, anneal="linear", rounds=4)
    deltas = {"0": np.arange(10, dtype=np.float32), "1": np.ones(10, np.float32)}
    updates = {name: update(delta, examples=1 + 2 * int(name), weights=True) for name, delta in deltas.items()}
    state = record.aggregate(record.start(asked, layout), updates, asked, layout)
    expected = server_rate(asked, 2) * (0.25 * deltas["0"] + 0.75 * deltas["1"])
    assert state.values[0].tolist() == pytest.approx(expected.tolist())


def update(scalars: np.ndarray[Any, Any], *, examples: int, weights: bool = False, steps: int = 50) -> Update:
    none = np.zeros(0, np.int64)
    return Update(2, bytes(16), Status.FINISHED, steps, examples, 1.0, scalars.astype(np.float32), none, weights)


# ---------------------------------------------------------------------------------------------------- zeroth order


def walked(here: Resident, asked: RunConfig, batches: Sequence[Batch], pool: Pool) -> torch.Tensor:
    """w0 - lr/P sum g z along the directions of `pool` in order, by plain loops over dense directions."""
    weights = here.replica.weights
    z = torch.from_numpy(dense(pool, here.replica.layout)).float()
    w, each = flat(weights), asked.directions_per_step

    def loss(at: torch.Tensor, batch: Batch) -> float:
        with torch.no_grad():
            for weight, part in zip(weights, at.split([p.numel() for p in weights]), strict=True):
                weight.copy_(part.reshape(weight.shape))
            return float(response_loss(here.replica.model, batch))

    for step, batch in enumerate(batches):
        mine = z[step * each : (step + 1) * each]
        slopes = [(loss(w + asked.eps * one, batch) - loss(w - asked.eps * one, batch)) / (2 * asked.eps) for one in mine]
        w = w - asked.lr / each * sum(g * one for g, one in zip(slopes, mine, strict=True))
    return w


@pytest.mark.parametrize("name", ["decomfl", "fedzo"])
def test_one_client_follows_a_plain_zeroth_order_walk(settings: Settings, name: str) -> None:
    """With seeds of the round (decomfl) or of the client (fedzo), of which each is used once."""
    asked = settings(name, clients=1, clients_per_round=1, rounds=1, coefficient_bits=24, scalar_bits=32, directions_per_step=2)
    here = Resident(asked)
    pool = own_pool(asked, 1, "0") if name == "fedzo" else here.algorithm.pool(asked, here.replica.layout, 0)
    assert pool.size == asked.local_steps * 2
    base = flat(here.replica.weights)
    expected = walked(here, asked, batches_of(here, asked, here.data.clients[0], 1, "0", asked.local_steps), pool)
    assert float((tuned(asked) - expected).norm() / (expected - base).norm()) < 1e-2


def test_decomfl_averages_slope_by_slope_and_draws_afresh_every_round() -> None:
    layout, asked = Layout.from_shapes([("a", (20,))]), RunConfig(algorithm="decomfl", local_steps=3, lr=0.1)
    record = ALGORITHMS["decomfl"]
    state = record.start(asked, layout)
    updates = {
        "0": update(np.array([1.0, 2.0, 3.0]), examples=1, steps=3),
        "1": update(np.array([5.0]), examples=3, steps=1),  # it ran out of time, and counts by the part that it did
    }
    moved = decomfl_aggregate(state, updates, asked, layout)
    assert moved.values[0].tolist() == pytest.approx([-0.1 * 3.0, -0.1 * 2.0, -0.1 * 3.0])
    following = record.begin_round(moved, asked, layout)
    assert (len(following.closed), following.pool.size) == (1, 3)
    assert following.pool != state.pool


# ---------------------------------------------------------------------------------------------------- adapters


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([[1, 5, 9, 70]])).logits
    return found


def test_a_merged_export_predicts_what_the_live_model_does(settings: Settings, tmp_path: Path) -> None:
    outcome = run(settings("lora"))
    lm, _, digest = load_tuned(outcome.folder)
    assert digest.hex() == outcome.summary["digest"]
    export_run(outcome.folder, tmp_path / "tuned")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    base = AutoModelForCausalLM.from_pretrained(settings("lora").model).eval()
    assert type(merged) is type(base)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in base.named_parameters()}
    assert torch.allclose(logits(merged), logits(lm.model), atol=1e-5)
    assert not torch.allclose(logits(merged), logits(base), atol=1e-3)


def test_adapters_start_as_nothing_and_are_the_same_everywhere(settings: Settings) -> None:
    asked = settings("lora", lora_rank=3)
    one, two = Resident(asked), Resident(asked)
    base = Resident(settings("fedavg"))
    assert torch.equal(logits(one.replica.model), logits(base.replica.model))
    assert one.replica.fingerprint == two.replica.fingerprint
    assert base_size(one.replica.model) == base.replica.layout.numel
    assert {entry.shape[0] for entry in one.replica.layout.entries if ".lora_A." in entry.name} == {3}
    other = Resident(settings("lora", lora_rank=3, seed=12))
    assert other.replica.fingerprint != one.replica.fingerprint


def test_another_base_under_the_same_adapters_is_refused(settings: Settings) -> None:
    asked = settings("lora")
    here = Resident(asked)
    model = here.replica.model
    before = fingerprint(model)
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).view(-1)[0] += 1.0
    assert fingerprint(model) != before


def test_layers_by_name_and_a_name_that_no_layer_has(settings: Settings) -> None:
    layout = Resident(settings("lora", lora_targets="q_proj, v_proj")).replica.layout
    assert len(layout.entries) == 2 * 2 * 2
    assert all("q_proj" in entry.name or "v_proj" in entry.name for entry in layout.entries)
    with pytest.raises(ModelError, match="No layer takes an adapter with lora_targets = query"):
        _ = Resident(settings("lora", lora_targets="query")).replica


def test_without_peft_the_error_says_what_to_install(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'fedtune\[lora\]'"):
        _ = Resident(settings("lora")).replica


def test_a_delta_of_adapters_is_refused_and_one_of_weights_is_the_model(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="tuned adapters beside them: use --format hf"):
        delta_of_run(run(settings("lora")).folder)
    release()
    outcome = run(settings("fedavg", out="two"))
    export_delta(outcome.folder, tmp_path / "full.safetensors")
    applied = apply_delta(settings("fedavg").model, tmp_path / "full.safetensors", tmp_path / "applied")
    assert applied.digest == outcome.summary["digest"]


# ---------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(("name", "width"), [("fedavg", 4), ("fedavg-16bit", 2), ("fedzo", 4)])
def test_full_weights_cost_their_width_both_ways(settings: Settings, name: str, width: int) -> None:
    asked = settings(name)
    summary = run(asked).summary
    release()
    needed = estimate_run(asked)
    assert needed.up == 37 + width * needed.parameters
    assert needed.down == 71 + width * needed.parameters
    assert summary["payload_bytes_up"] == needed.up * needed.client_rounds
    assert summary["payload_bytes_down"] <= needed.down * needed.client_rounds


def test_the_grid_of_full_weights(tiny_lm: Any) -> None:
    """A step is 2^-30 of the largest change at most, at 16 bits 2^-14; less than the rounding of the weights themselves."""
    values = np.random.default_rng(0).standard_normal((1, 1000)) * 1e-3
    for bits in (16, 32):
        found = quantise(Pool("axes", 0, 1000), values, bits)
        step = 2.0 ** int(found.exponents[0])
        assert np.abs(found.q * step - values).max() <= step / 2
        assert step <= np.abs(values).max() * 2.0 ** (2 - bits)
    layout = Layout.of(tiny_lm.model)
    replica = Replica(tiny_lm.model, layout)
    base = flat(replica.weights)
    change = np.random.default_rng(1).standard_normal((1, layout.numel)) * 1e-3
    replica.become(Coefficients((quantise(Pool("axes", 0, layout.numel), change, 32),)))
    assert torch.allclose(flat(replica.weights), base + torch.from_numpy(change[0]).float(), rtol=2.0**-23, atol=2.0**-27)
