"""A recorded run, walked again with fedtune's own code: model, data, replica, local work and aggregation as in a run.

Only two things are put in from outside: which rows and seeds a client used (the official codes drew them from global
generators) and, for a state, what the clients sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedtune.algorithms import ALGORITHMS, LocalWork, State, ferret
from fedtune.algorithms import fedkseed as fedkseed_module
from fedtune.config import RunConfig
from fedtune.data.batches import Batch, collate
from fedtune.data.encode import encode
from fedtune.data.samples import load_samples
from fedtune.directions import Pool
from fedtune.evaluation import evaluate, response_loss
from fedtune.layout import Layout
from fedtune.models import load_model
from fedtune.progress import ClientStep, Event, listening
from fedtune.replica import Replica
from fedtune.wire import Instruction, Status, Update
from tests.fidelity.traces import DATA, MODEL, FerretRecording, Recording, Step

Bools = npt.NDArray[np.bool_]


def fedkseed_config(shared: Path, recording: Recording, **changes: object) -> RunConfig:
    """Our settings for the recorded FedKSeed run; coefficients and scalars as fine as messages allow."""
    official = recording.config
    return RunConfig.from_mapping(
        {
            **_common(shared, official),
            "algorithm": "fedkseed",
            "family": "torch",
            "eps": official["zo_eps"],
            **changes,
        }
    )


def ferret_config(shared: Path, recording: Recording, **changes: object) -> RunConfig:
    """Our settings for the recorded Ferret run: the official mode of docs/fidelity.md."""
    official = recording.config
    return RunConfig.from_mapping(
        {
            **_common(shared, official),
            "algorithm": "ferret",
            "family": "torch-truncated",
            "blocks": "grouped",
            "allocation": "official",
            "reconstruction": "official",
            "server_lr": official["slr_max"],
            "momentum": official["momentum"],
            "anneal": {"no": "none"}[official["anneal"]],
            "accumulate": official["n_accum"],
            **changes,
        }
    )


def _common(shared: Path, official: Mapping[str, object]) -> dict[str, object]:
    return {
        "model": str(shared / MODEL),
        "data": str(shared / DATA),
        "template": "fedkseed",
        "max_length": official["max_length"],
        "clients": official["num_clients"],
        "client_fraction": official["m"],
        "rounds": official["rounds"],
        "local_steps": official["local_step"],
        "batch_size": official["batch_size"],
        "weighting": "equal" if official["equal_weight"] else "examples",
        "lr": official["lr"],
        "K": official["K"],
        "coefficient_bits": 24,
        "scalar_bits": 32,
        "device": "cpu",
        "threads": 1,
    }


class Replay:
    """Model, tokens and algorithm of a recorded run."""

    def __init__(self, recording: Recording, config: RunConfig) -> None:
        self.recording, self.config = recording, config
        self.algorithm = ALGORITHMS[config.algorithm]
        self.lm = load_model(config)
        self.layout = Layout.of(self.lm.model, self.algorithm.block_rule(config))
        self.replica = Replica(self.lm.model, self.layout)
        samples, _ = load_samples(config.data, config, False)
        self.encoded = {one.row: one for one in encode(samples, self.lm.tokenizer, config.template, config.max_length).usable}
        pool = Pool(config.family, 0, len(recording.candidates), recording.candidates)
        self.base = replace(self.algorithm.start(config, self.layout), pool=pool)

    def become(self, state: State) -> list[torch.Tensor]:
        """Rebuild the model of `state` with our Replica; a copy of its weights."""
        self.replica.touch()
        self.replica.become(state.published(self.config.coefficient_bits))
        return [weight.detach().clone() for weight in self.replica.weights]

    def heldout_loss(self) -> float:
        """Of the live weights: the mean over the recorded held-out samples of each sample's mean token loss."""
        return evaluate(self.lm, [self.encoded[row] for row in self.recording.heldout], 32).loss_sample_mean

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """Our server's half of a round."""
        return self.algorithm.aggregate(state, updates, self.config, self.layout)

    def train(self, state: State, round: int, client: int) -> tuple[Update, list[float]]:
        """Our client's half on the recorded rows, from the live weights: the update and the loss of each step."""
        self.replica.touch()
        losses: list[float] = []

        def listen(event: Event) -> None:
            if isinstance(event, ClientStep):
                losses.append(event.loss)

        published = state.published(self.config.coefficient_bits)
        digest = published.digest(self.replica.fingerprint)
        fingerprint, layout = self.replica.fingerprint, self.layout.digest
        none = np.zeros(0, dtype=np.uint16)
        instruction = Instruction(round, fingerprint, layout, digest, 0, published.pools, none)
        with listening(listen):
            return self.algorithm.local_update(self._work(state, round, client), self.config, instruction), losses

    def _work(self, state: State, round: int, client: int) -> LocalWork:
        return LocalWork(
            model=self.replica.model,
            weights=self.replica.weights,
            loss=response_loss,
            batches=self._batches(self.recording.steps[round, client]),
            directions=self.replica.directions(state.pool),
            perturbation=self.replica.perturbation,
            client=str(client),
            examples=len(self.recording.partition[client]),
        )

    def _batches(self, steps: tuple[Step, ...]) -> Iterator[Batch]:
        return (collate([self.encoded[step.row]], self.lm.tokenizer.pad_token_id) for step in steps)


def update(recording: Recording, round: int, client: int, scalars: npt.NDArray[np.float32], counts: object = ()) -> Update:
    """A client's message with the given numbers, as our server reads it from the wire."""
    steps, examples = len(recording.steps[round, client]), len(recording.partition[client])
    return Update(round, bytes(16), Status.FINISHED, steps, examples, 0.0, scalars, np.array(counts, dtype=np.int64))


# ------------------------------------------------------------------ FedKSeed


def use_recorded_seeds(patch: pytest.MonkeyPatch, recording: Recording) -> None:
    """FedKSeed's clients use the seeds that were recorded, in place of those of our named stream."""

    def recorded(
        config: RunConfig, round: int, client: str, pool_size: int, weights: object, most: int | None = None
    ) -> npt.NDArray[np.int64]:
        return np.array([recording.numbers[step.seed] for step in recording.steps[round, int(client)]], dtype=np.int64)[:most]

    patch.setattr(fedkseed_module, "drawn_seeds", recorded)


def recorded_scalars(recording: Recording, round: int) -> dict[str, Update]:
    """What the clients of a round sent."""
    return {
        str(client): update(recording, round, client, np.array([s.scalar for s in recording.steps[round, client]], np.float32))
        for client in recording.schedule[round - 1]
    }


def fedkseed_states(replay: Replay, last: int) -> Iterator[State]:
    """The states after rounds 0 .. last, by our aggregation of the recorded scalars."""
    state = replay.base
    yield state
    for round in range(1, last + 1):
        state = replay.aggregate(state, recorded_scalars(replay.recording, round))
        yield state


# ------------------------------------------------------------------ Ferret


def chosen(recording: FerretRecording, round: int, client: int) -> Bools:
    """bool [groups, K]: the seeds on which a client projected."""
    return np.asarray(recording.coordinates[round, client].T != 0.0)


def use_recorded_choice(patch: pytest.MonkeyPatch, recording: FerretRecording) -> None:
    """Ferret's clients use the seeds that were recorded, in place of those of our named stream."""

    def recorded(config: RunConfig, round: int, client: str, counts: object, pool_size: int) -> Bools:
        wanted = chosen(recording, round, int(client))
        assert wanted.sum(axis=1).tolist() == np.asarray(counts).tolist()
        return wanted

    patch.setattr(ferret, "chosen_seeds", recorded)


def official_coordinates(
    ours: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], sizes: object
) -> npt.NDArray[np.float64]:
    """[L, K] coordinates <z, w_end - w_start> in the official code's measure, <v, w_start - w_end> d_l / K_l."""
    d = np.asarray(sizes, dtype=np.float64)[:, None]
    return -ours / np.sqrt(3.0 * d) * d / counts[:, None]


def our_coordinates(official: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], sizes: object) -> npt.NDArray[np.float64]:
    """The inverse of `official_coordinates`."""
    d = np.asarray(sizes, dtype=np.float64)[:, None]
    return -official * np.sqrt(3.0 * d) / d * counts[:, None]


def recorded_coordinates(recording: FerretRecording, round: int) -> dict[str, Update]:
    """What the clients of a round sent, in our measure."""
    sent = {}
    for client in recording.schedule[round - 1]:
        wanted = chosen(recording, round, client)
        counts = wanted.sum(axis=1)
        table = our_coordinates(recording.coordinates[round, client].T.astype(np.float64), counts, recording.group_sizes)
        sent[str(client)] = update(recording, round, client, table[wanted].astype(np.float32), counts)
    return sent


def ferret_states(replay: Replay, last: int) -> Iterator[State]:
    """The states after rounds 0 .. last, by our aggregation of the recorded coordinates."""
    assert isinstance(replay.recording, FerretRecording)
    state = replay.base
    yield state
    for round in range(1, last + 1):
        state = replay.aggregate(state, recorded_coordinates(replay.recording, round))
        yield state


def change(before: list[torch.Tensor], after: list[torch.Tensor]) -> list[torch.Tensor]:
    """float64: after - before, tensor by tensor."""
    return [b.detach().double() - a.detach().double() for a, b in zip(before, after, strict=True)]


def norm(deltas: list[torch.Tensor]) -> float:
    """L2 over all tensors."""
    return float(torch.stack([delta.square().sum() for delta in deltas]).sum().sqrt())
