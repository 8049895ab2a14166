"""What a run will need, before it starts: memory, bytes and time, from the loaded model and two local steps on real data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedtune import wire
from fedtune.algorithms import State
from fedtune.algorithms.ferret import most_coordinates
from fedtune.coefficients import Coefficients, PoolCoefficients
from fedtune.config import RunConfig
from fedtune.data.batches import Batch, collate
from fedtune.evaluation import evaluate, response_loss
from fedtune.resident import Resident
from fedtune.wire import Instruction, Kind

FLOAT32 = 4  # bytes
TIMED_STEPS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the training device.

    Attributes:
        weights: the live weights.
        base: the copy of the base model that every rebuild starts from.
        scratch: perturbed weights, of the largest module or of a small model as a whole (FedKSeed).
        logits: float32 logits of the longest batch, the largest tensor of a forward pass.
        gradients: one for each weight (Ferret).
        start: the weights that the local steps started from (Ferret).
        saved: activations that the backward pass over the longest batch needs, logits included (Ferret).
        difference: float32 update that is projected when the steps are done (Ferret).
    """

    weights: int
    base: int
    scratch: int
    logits: int
    gradients: int
    start: int
    saved: int
    difference: int

    @property
    def zeroth_order(self) -> int:
        """Peak of a FedKSeed client: inference, the scratch and the base."""
        return self.weights + self.base + self.scratch + 2 * self.logits

    @property
    def first_order(self) -> int:
        """Peak of a Ferret client: in the backward pass, or in the projection that follows the steps."""
        return self.weights + self.base + self.start + max(self.gradients + self.saved + self.logits, self.difference)


@dataclass(frozen=True)
class Estimate:
    """See the fields. Bytes are payload; a message adds Flower's own headers.

    Attributes:
        up: one client's update; down: one instruction when every coefficient of the open pool is in use (the most).
        step_seconds: one local step; client_seconds: what a client needs in a round besides its steps (rebuild, projection).
        evaluation_seconds: one evaluation; evaluations: how many the run has (generation is not included).
    """

    parameters: int
    memory: Memory
    up: int
    down: int
    client_rounds: int
    fedavg: int
    step_seconds: float
    client_seconds: float
    evaluation_seconds: float
    evaluations: int
    local_steps: int

    @property
    def payload(self) -> int:
        """Most payload bytes of the run."""
        return (self.up + self.down) * self.client_rounds

    @property
    def seconds(self) -> float:
        """The whole run with clients one after another, without loading."""
        clients = self.client_rounds * (self.local_steps * self.step_seconds + self.client_seconds)
        return clients + self.evaluations * self.evaluation_seconds


def estimate_run(config: RunConfig) -> Estimate:
    """Load model and data of `config` and measure; nothing is written.

    Raises:
        FedtuneError: model or data cannot be used.
    """
    here = Resident(config)
    replica, algorithm = here.replica, here.algorithm
    state = algorithm.start(config, replica.layout)
    client_rounds = config.rounds * config.asked_per_round
    step, client = _time_client(here, state)
    rebuild = _time_rebuild(here, state)
    evaluation, evaluations = _time_evaluation(here), _evaluations(config)
    return Estimate(
        parameters=replica.layout.numel,
        memory=_memory(here),
        up=_up(here),
        down=_down(here, state),
        client_rounds=client_rounds,
        fedavg=2 * FLOAT32 * replica.layout.numel * client_rounds,
        step_seconds=step,
        client_seconds=client + rebuild,
        evaluation_seconds=evaluation + rebuild,
        evaluations=evaluations,
        local_steps=config.local_steps,
    )


# ---------------------------------------------------------------------------------------------------- bytes


def _full(state: State) -> PoolCoefficients:
    """The open pool with every coefficient in use, as after many rounds."""
    blocks = len(state.values)
    return PoolCoefficients(state.pool, np.ones((blocks, state.pool.size), np.int32), np.full(blocks, -20, np.int32))


def _instruction(here: Resident, state: State, pool: PoolCoefficients) -> Instruction:
    replica = here.replica
    return Instruction(
        round=1,
        fingerprint=replica.fingerprint,
        layout=replica.layout.digest,
        digest=Coefficients((pool,)).digest(replica.fingerprint),
        held=0,
        pools=(pool,),
        draw_weights=here.algorithm.draw_weights(state),
    )


def _down(here: Resident, state: State) -> int:
    return len(wire.encode_instruction(_instruction(here, state, _full(state)), here.config.coefficient_bits))


def _up(here: Resident) -> int:
    """Length of an update: as many scalars as local steps, or the most coordinates that can be sent and a count a block."""
    config, coordinates = here.config, here.algorithm.kind == Kind.COORDINATES
    layout = here.replica.layout
    update = wire.Update(
        round=1,
        digest=bytes(16),
        status=wire.Status.FINISHED,
        steps=config.local_steps,
        examples=1,
        train_loss=0.0,
        scalars=np.zeros(most_coordinates(config, layout) if coordinates else config.local_steps, dtype=np.float32),
        counts=np.zeros(layout.blocks if coordinates else 0, dtype=np.int64),
    )
    return len(wire.encode_update(update, config.scalar_bits))


# ---------------------------------------------------------------------------------------------------- time


def _time_client(here: Resident, state: State) -> tuple[float, float]:
    """(seconds per local step, seconds of a client's round besides its steps), from real local updates on client 0."""
    _local_update(here, state, 1)  # kernels compile, caches warm up
    one = _seconds(here, lambda: _local_update(here, state, 1))
    more = _seconds(here, lambda: _local_update(here, state, 1 + TIMED_STEPS))
    step = max(0.0, more - one) / TIMED_STEPS
    return step, max(0.0, one - step)


def _local_update(here: Resident, state: State, steps: int) -> None:
    """`steps` local steps of client 0 from the base model; the live weights are written and not put back."""
    config = here.config.replace(local_steps=steps)
    work = here.work("0", here.data.clients[0], 1, state.pool)
    here.replica.touch()
    here.algorithm.local_update(work, config, _instruction(here, state, state.published(config.coefficient_bits).pools[-1]))


def _time_rebuild(here: Resident, state: State) -> float:
    """Seconds to bring the model to a state in which every coefficient is used.

    Where the cost grows with K (the family is not `fast_combine`), K times the cost of one direction, an upper bound.
    """
    replica = here.replica
    directions = replica.directions(state.pool)
    if not directions.family.fast_combine:
        one = _seconds(here, lambda: directions.add([weight.data for weight in replica.weights], 0, 0.0))
        replica.touch()
        return float(one * state.pool.size)
    seconds = _seconds(here, lambda: replica.become(Coefficients((_full(state),))))
    replica.become(Coefficients(()))
    return seconds


def _time_evaluation(here: Resident) -> float:
    """Seconds for the held-out set: one batch of each of three lengths is timed, and stands for a third of the batches."""
    heldout, size = here.data.heldout, here.config.eval_batch_size
    batches = -(-len(heldout) // size)
    ordered = sorted(heldout, key=lambda sample: len(sample.input_ids))
    starts = sorted({min(len(ordered) - 1, int(len(ordered) * part)) for part in (0.0, 0.5, 0.9)})
    timed = [ordered[start : start + size] for start in starts]
    seconds = _seconds(here, lambda: [evaluate(here.language_model, samples, size) for samples in timed])
    return seconds / len(timed) * batches


def _evaluations(config: RunConfig) -> int:
    """How often the held-out loss is measured: before the first round, after the last, and every `eval_every` rounds."""
    if not config.eval_every:
        return 2
    between = config.rounds // config.eval_every
    return 1 + between + (config.rounds % config.eval_every > 0)


def _seconds(here: Resident, work: Callable[[], object]) -> float:
    _synchronise(here)
    begun = time.perf_counter()
    work()
    _synchronise(here)
    return time.perf_counter() - begun


def _synchronise(here: Resident) -> None:
    if here.language_model.device.type == "cuda":
        torch.cuda.synchronize(here.language_model.device)


# ---------------------------------------------------------------------------------------------------- memory


def _memory(here: Resident) -> Memory:
    replica = here.replica
    weights = sum(weight.numel() * weight.element_size() for weight in replica.weights)
    batch = _longest_batch(here)
    logits, saved = _activations(here, batch)
    return Memory(
        weights=weights,
        base=weights,
        scratch=replica.perturbation.scratch_bytes,
        logits=logits,
        gradients=weights,
        start=weights,
        saved=saved,
        difference=FLOAT32 * replica.layout.numel,
    )


def _longest_batch(here: Resident) -> Batch:
    every = [sample for client in here.data.clients for sample in client]
    longest = sorted(every, key=lambda sample: -len(sample.input_ids))[: here.config.batch_size]
    return collate(longest, here.language_model.tokenizer.pad_token_id).to(here.language_model.device)


def _activations(here: Resident, batch: Batch) -> tuple[int, int]:
    """(bytes of float32 logits, bytes kept for the backward pass): each storage once, weights not counted."""
    model: Any = here.language_model.model
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = response_loss(model, batch)
    del loss
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return FLOAT32 * vocabulary * batch.targets.numel(), sum(kept.values())
