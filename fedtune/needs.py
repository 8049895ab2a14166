"""What a run needs besides time: memory and payload bytes, from the shapes of its model; no weight is looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune import wire
from fedtune.algorithms import ALGORITHMS, Algorithm, State
from fedtune.algorithms.base import pool_number
from fedtune.algorithms.first_order import gathers
from fedtune.algorithms.subspace import held_bytes
from fedtune.beside import LARGE
from fedtune.coefficients import Coefficients, PoolCoefficients, leading
from fedtune.config import RunConfig
from fedtune.data.batches import Batch
from fedtune.directions.base import make_family
from fedtune.evaluation import response_loss
from fedtune.layout import Layout, base_size
from fedtune.perturb import Perturbation
from fedtune.replica import FEW
from fedtune.scratch import IN_MEMORY
from fedtune.wire import Instruction

FLOAT32, FLOAT64 = 4, 8  # bytes
KEPT_OF_COORDINATES = 6  # numbers of a client for each of them: coordinate, gradient, mean, square and temporaries (subspace)
MOST_MADE = 65536  # coefficients of a pool that are made to count its bytes: a multiple of 8, so that bits stay in step
NO_FINGERPRINT = bytes(16)  # as long as any


@dataclass(frozen=True)
class Memory:
    """Bytes in memory; the base model is not among them, since it is mapped from disk and read tensor by tensor.

    Attributes:
        weights: the live weights.
        scratch: perturbed weights, of the largest module or of a small model as a whole (FedKSeed).
        logits: float32 logits of the longest batch, the largest tensor of a forward pass.
        gradients: the largest one, or one for each weight with `accumulate` or `clip_norm`, or where they are few (Ferret);
            the largest and those held to be projected together (subspace).
        optimizer: state of momentum or adamw, float32; subspace: coordinates and all that is kept of them, float64.
        master: the float32 copy of 16-bit weights, with `update_rounding = master`.
        saved: activations that the backward pass over the longest batch needs, logits included (Ferret).
        difference: the largest tensor's start and its update in float32, projected when the steps are done (Ferret).
    """

    weights: int
    scratch: int
    logits: int
    gradients: int
    optimizer: int
    master: int
    saved: int
    difference: int

    @property
    def zeroth_order(self) -> int:
        """Peak of a FedKSeed client: inference and the scratch."""
        return self.weights + self.master + self.scratch + 2 * self.logits

    @property
    def first_order(self) -> int:
        """Peak of a Ferret client: in the backward pass, or in the projection that follows the steps."""
        return self.weights + self.master + max(self.optimizer + self.gradients + self.saved + self.logits, self.difference)


@dataclass(frozen=True)
class Needs:
    """See the fields. Bytes are payload; a message adds Flower's own headers.

    Attributes:
        up: one client's update; down: one instruction with one pool, of which every coefficient is in use (the most).
        client_rounds: updates in the whole run; fedavg: bytes if each of them sent all weights in float32, both ways.
        state: bytes of the server's coefficients.
        updates_on_disk: updates that the run folder holds at the same time at most.
        cache: bytes of the private file with the base and the finished pools, of a process that trains (see replica.py).
        pools_down: pools sent in the whole run if no client that is asked has seen an earlier one (the most).
    """

    parameters: int
    memory: Memory
    up: int
    down: int
    client_rounds: int
    pools_down: int
    fedavg: int
    state: int
    updates_on_disk: int
    cache: int

    @property
    def payload(self) -> int:
        """Most payload bytes of the run."""
        return self.up * self.client_rounds + self.down * self.pools_down

    @property
    def disk(self) -> int:
        """Bytes of the run folder: the updates, two states, and the last and the best model as files."""
        return self.up * self.updates_on_disk + 2 * self.state + 2 * self.down


def needs(config: RunConfig, model: torch.nn.Module, layout: Layout, perturbation: Perturbation, longest: Batch) -> Needs:
    """The needs of a run of `config` with `model`, whose largest training batch is `longest`."""
    algorithm = ALGORITHMS[config.algorithm]
    client_rounds = config.rounds * config.invited_per_round
    up = 0 if config.alone else algorithm.longest_update(config, layout)
    kept = config.keep_updates or up <= LARGE
    return Needs(
        parameters=layout.numel,
        memory=_memory(config, model, layout, perturbation, longest),
        up=up,
        down=0 if config.alone else _down(config, algorithm, layout),
        client_rounds=client_rounds,
        pools_down=config.invited_per_round * sum(1 + pool_number(config, round) for round in range(1, config.rounds + 1)),
        fedavg=2 * FLOAT32 * base_size(model) * client_rounds,
        state=layout.blocks * algorithm.pool_size(config, layout) * algorithm.value_type(config).itemsize,
        updates_on_disk=client_rounds if kept else config.invited_per_round,
        cache=_anchor(config, algorithm, layout),
    )


def _anchor(config: RunConfig, algorithm: Algorithm, layout: Layout) -> int:
    """Bytes of the file in which a replica keeps the base with the finished pools, where it needs one by the last round."""
    finished, size = pool_number(config, config.rounds), FLOAT32 * layout.numel
    if not finished or size <= IN_MEMORY:
        return 0
    slow = not make_family(algorithm.pool(config, layout, 0), layout).fast_combine
    return size if finished > FEW or slow or config.algorithm == "subspace" else 0


# ---------------------------------------------------------------------------------------------------- bytes


def full_pool(state: State) -> PoolCoefficients:
    """The open pool with every coefficient in use, as after many rounds."""
    blocks = len(state.values)
    return PoolCoefficients(state.pool, np.ones((blocks, state.pool.size), np.int32), np.full(blocks, -20, np.int32))


def first_instruction(
    config: RunConfig,
    algorithm: Algorithm,
    layout: Layout,
    state: State,
    pool: PoolCoefficients,
    fingerprint: bytes = NO_FINGERPRINT,
) -> Instruction:
    """The instruction of round 1 with `pool` as the coefficients so far."""
    return Instruction(
        round=1,
        fingerprint=fingerprint,
        layout=layout.digest,
        digest=Coefficients((pool,)).digest(fingerprint),
        held=0,
        pools=(pool,),
        draw_weights=algorithm.draw_weights(state),
        counts=algorithm.counts(state, config, layout).astype(np.uint16),
    )


def _down(config: RunConfig, algorithm: Algorithm, layout: Layout) -> int:
    """Length of an instruction; of a pool as large as the model, from one that is not, since each number costs the same."""
    pool = algorithm.pool(config, layout, 0)
    small = replace(pool, size=min(pool.size, MOST_MADE))
    more = (pool.size - small.size) * config.coefficient_bits * layout.blocks
    shape = (layout.blocks, small.size)
    state = State(0, (), small, np.zeros(shape), algorithm.statistics(*shape))
    pool_in_use = _asked_for(full_pool(state), config, algorithm.counts(state, config, layout))
    instruction = first_instruction(config, algorithm, layout, state, pool_in_use)
    return len(wire.encode_instruction(instruction, config.coefficient_bits)) + -(-more // 8)


def _asked_for(pool: PoolCoefficients, config: RunConfig, counts: npt.NDArray[np.int64]) -> PoolCoefficients:
    """What of a full pool can be in use: the leading `counts` of each block where the server chooses them for a fresh pool."""
    if not counts.size or config.pool_every != 1:
        return pool
    return replace(pool, q=pool.q * leading(counts, pool.pool.size).astype(pool.q.dtype))


# ---------------------------------------------------------------------------------------------------- memory


STATES = {"sgd": 0, "momentum": 1, "adamw": 2}  # float32 numbers that an optimiser keeps for each weight


def _memory(config: RunConfig, model: torch.nn.Module, layout: Layout, perturbation: Perturbation, longest: Batch) -> Memory:
    sizes = [weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad]
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    logits, saved = _activations(model, longest)
    algorithm, of_coordinates = ALGORITHMS[config.algorithm], 0
    gradients = sum(sizes) if gathers(config, sum(sizes)) else max(sizes)
    if config.algorithm == "subspace":
        pool = algorithm.pool(config, layout, 0)
        of_coordinates = KEPT_OF_COORDINATES * FLOAT64 * layout.blocks * pool.size
        held = held_bytes(next(model.parameters()).device)
        gradients = sum(sizes) if make_family(pool, layout).whole else min(sum(sizes), max(sizes) + held)
    return Memory(
        weights=weights,
        scratch=perturbation.scratch_bytes,
        logits=logits,
        gradients=gradients,
        optimizer=of_coordinates or STATES[config.optimizer] * FLOAT32 * layout.numel,
        master=FLOAT32 * layout.numel if config.update_rounding == "master" else 0,
        saved=saved,
        difference=0 if of_coordinates else 2 * FLOAT32 * max(entry.numel for entry in layout.entries),
    )


def _activations(model: Any, batch: Batch) -> tuple[int, int]:
    """(bytes of float32 logits, bytes kept for the backward pass): each storage once, weights not counted."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = response_loss(model, batch)
    del loss
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return FLOAT32 * vocabulary * batch.targets.numel(), sum(storage.nbytes() for storage in kept.values())
