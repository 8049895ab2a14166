"""What a run will need, before it starts: memory, bytes and time, from the loaded model and two local steps on real data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedtune.algorithms import State
from fedtune.coefficients import Coefficients
from fedtune.config import RunConfig
from fedtune.data.batches import Batch, collate
from fedtune.evaluation import evaluate
from fedtune.needs import Needs, first_instruction, full_pool, needs
from fedtune.resident import Resident

TIMED_STEPS = 2


@dataclass(frozen=True)
class Estimate(Needs):
    """What a run needs, with the time that it takes on this machine.

    Attributes:
        step_seconds: one local step; client_seconds: what a client needs in a round besides its steps (rebuild, projection).
        evaluation_seconds: one evaluation; evaluations: how many the run has (generation is not included).
    """

    step_seconds: float
    client_seconds: float
    evaluation_seconds: float
    evaluations: int
    local_steps: int

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
    replica = here.replica
    state = here.algorithm.start(config, replica.layout)
    step, client = _time_client(here, config)
    rebuild = _time_rebuild(here, state)
    evaluation, evaluations = _time_evaluation(here, config.eval_batch_size), _evaluations(config)
    longest = _longest_batch(here, config.batch_size)
    besides_time = needs(config, replica.model, replica.layout, replica.perturbation, longest)
    return Estimate(
        **vars(besides_time),
        step_seconds=step,
        client_seconds=client + rebuild,
        evaluation_seconds=evaluation + rebuild,
        evaluations=evaluations,
        local_steps=config.client_steps,
    )


def _longest_batch(here: Resident, size: int) -> Batch:
    every = [sample for client in here.data.clients for sample in client]
    longest = sorted(every, key=lambda sample: -len(sample.input_ids))[:size]
    return collate(longest, here.language_model.tokenizer.pad_token_id).to(here.language_model.device)


# ---------------------------------------------------------------------------------------------------- time


def _time_client(here: Resident, config: RunConfig) -> tuple[float, float]:
    """(seconds per local step, seconds of a client's round besides its steps), from real local updates on client 0."""
    _local_update(here, config, 1)  # kernels compile, caches warm up
    one = _seconds(here, lambda: _local_update(here, config, 1))
    more = _seconds(here, lambda: _local_update(here, config, 1 + TIMED_STEPS))
    times = config.client_steps // config.local_steps  # of `central`, whose steps those are of several clients
    step = max(0.0, more - one) / TIMED_STEPS / times
    return step, max(0.0, one - step)


def _local_update(here: Resident, asked: RunConfig, steps: int) -> None:
    """`steps` local steps of client 0 from the base model; the live weights are written and not put back."""
    config = asked.replace(local_steps=steps)
    state = here.algorithm.start(config, here.replica.layout)
    model = state.published(config.coefficient_bits)
    work = here.work(config, "0", here.data.clients[0], 1, model)
    instruction = first_instruction(
        asked, here.algorithm, here.replica.layout, state, model.pools[-1], here.replica.fingerprint
    )
    here.algorithm.local_update(work, config, instruction)


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
    seconds = _seconds(here, lambda: replica.become(Coefficients((full_pool(state),))))
    replica.become(Coefficients(()))
    return seconds


def _time_evaluation(here: Resident, size: int) -> float:
    """Seconds for the held-out set: one batch of each of three lengths is timed, and stands for a third of the batches."""
    heldout = here.data.heldout
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
