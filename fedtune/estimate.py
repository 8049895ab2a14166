"""What a run will need, before it starts: memory, bytes and time, from the loaded model and a few pieces of the work itself.

Time is linear in the tokens of a batch, so two batches, a short and a long one, are timed, and what lies between them is
summed over the batches that the run will see. The first batch of a length costs more, since libraries make kernels for it:
that is timed too, and counted for as many lengths as the run is expected to see. Memory is the peak while the largest batch
is worked on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat
from typing import Any

import torch

from fedtune.algorithms import State
from fedtune.coefficients import Coefficients
from fedtune.config import RunConfig
from fedtune.data.batches import Batch, collate
from fedtune.evaluation import evaluate, greedy_texts, in_turn, prompt_batches
from fedtune.needs import Needs, first_instruction, full_pool, needs
from fedtune.peaks import memory_now, peak_of
from fedtune.resident import Resident

TIMED_STEPS = 2
TIMED_TOKENS = 4  # that are generated, besides the first
SEEN_CLIENTS, SEEN_BATCHES = 32, 16  # clients and batches of each whose lengths stand for those of the run


@dataclass(frozen=True)
class Estimate(Needs):
    """What a run needs, with the time that it takes on this machine.

    Attributes:
        step_seconds: one local step; client_seconds: what a client needs in a round besides its steps (rebuild, projection).
        evaluation_seconds: one evaluation; evaluations: how many the run has.
        generation_seconds: the texts of the held-out prompts, at most; generations: how often they are written.
        loaded: bytes of the process (on CUDA: of the device) with model and data and nothing else.
        peaks: the same while the longest batch of each kind of work is in hand, by kind.
    """

    step_seconds: float
    client_seconds: float
    evaluation_seconds: float
    evaluations: int
    generation_seconds: float
    generations: int
    local_steps: int
    loaded: int
    peaks: dict[str, int]

    @property
    def seconds(self) -> float:
        """The whole run with clients one after another, without loading."""
        clients = self.client_rounds * (self.local_steps * self.step_seconds + self.client_seconds)
        return clients + self.evaluations * self.evaluation_seconds + self.generations * self.generation_seconds

    @property
    def peak(self) -> int:
        """Bytes of the process (on CUDA: of the device) at most, server and one client in one."""
        return max(self.peaks.values())


def estimate_run(config: RunConfig) -> Estimate:
    """Load model and data of `config` and measure; nothing is written.

    Raises:
        FedtuneError: model or data cannot be used.
    """
    here = Resident(config)
    replica, device = here.replica, here.language_model.device
    here.load()
    loaded = memory_now(device)
    state = here.algorithm.start(config, replica.layout)
    longest = _longest_batch(here, config.batch_size)
    rebuild = _time_rebuild(here, state)
    step, client = _time_client(here, config)
    besides = needs(config, replica.model, replica.layout, replica.perturbation, longest)
    peaks = {
        "training": _peak_of_training(here, config, longest, besides),
        "evaluation": _peak_of_evaluation(here, config),
        "messages": loaded + besides.down + besides.up,
    }
    generated = len(_prompts(here, config))
    if generated:
        peaks["generation"] = _peak_of_generation(here, config)
    return Estimate(
        **vars(besides),
        step_seconds=step,
        client_seconds=client + rebuild,
        evaluation_seconds=_time_evaluation(here, config.eval_batch_size) + rebuild,
        evaluations=_evaluations(config),
        generation_seconds=_time_generation(here, config) if generated else 0.0,
        generations=2 if generated else 0,
        local_steps=config.client_steps,
        loaded=loaded,
        peaks=peaks,
    )


def _longest_batch(here: Resident, size: int) -> Batch:
    every = [sample for client in here.data.clients for sample in client]
    longest = sorted(every, key=lambda sample: -len(sample.input_ids))[:size]
    return collate(longest, here.language_model.tokenizer.pad_token_id).to(here.language_model.device)


# ---------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Line:
    """Seconds as a line through two points, at least 0: (tokens, seconds) of a short and of a long piece of work."""

    short: tuple[int, float]
    long: tuple[int, float]

    def at(self, tokens: float) -> float:
        """Seconds for so many tokens; through the origin if both points have as many."""
        (a, at_a), (b, at_b) = self.short, self.long
        if a == b:
            return at_b * tokens / b
        return max(0.0, at_a + (at_b - at_a) * (tokens - a) / (b - a))


def _time_client(here: Resident, config: RunConfig) -> tuple[float, float]:
    """(seconds per local step, seconds of a client's round besides its steps), from real local updates."""
    seen = sorted(_batches_of_clients(here, config), key=_tokens)
    short, middle, long = (seen[len(seen) * tenths // 10] for tenths in (2, 5, 9))
    _local_update(here, config, 1, long)  # kernels compile, caches warm up
    times = config.client_steps // config.local_steps  # of `central`, whose steps those are of several clients
    timed: list[tuple[int, float]] = []
    rest, first = 0.0, list[float]()
    for batch in (short, middle, long):
        new = _seconds(here, partial(_local_update, here, config, 1, batch))
        one = _seconds(here, partial(_local_update, here, config, 1, batch))
        if batch is not long:
            first.append(max(0.0, new - one))
        if batch is not middle:
            more = _seconds(here, partial(_local_update, here, config, 1 + TIMED_STEPS, batch))
            step = max(0.0, more - one) / TIMED_STEPS
            timed.append((_tokens(batch), step / times))
            rest = max(0.0, one - step)
    line = Line(*timed)
    known = sum(line.at(_tokens(batch)) for batch in seen) / len(seen)
    return known + share_of_new(Counter(map(_tokens, seen)), _steps(config)) * sum(first) / len(first), rest


def share_of_new(lengths: Counter[int], steps: int) -> float:
    """The expected share of `steps` batches that are the first of their length, if they are drawn from `lengths`."""
    total = lengths.total()
    return sum(1 - (1 - count / total) ** steps for count in lengths.values()) / steps


def _steps(config: RunConfig) -> int:
    """Local steps of all clients of the run."""
    return config.rounds * config.invited_per_round * config.client_steps


def _tokens(batch: Batch) -> int:
    return batch.input_ids.numel()


def _batches_of_clients(here: Resident, config: RunConfig) -> list[Batch]:
    """The first batches that clients would see in a round."""
    found: list[Batch] = []
    for number in range(0, len(here.data.clients), -(-len(here.data.clients) // SEEN_CLIENTS)):
        samples = here.algorithm.samples(here.data.clients, number)
        found += islice(here.batches(config, str(number), samples, 1), SEEN_BATCHES)
    return found


def _local_update(here: Resident, asked: RunConfig, steps: int, batch: Batch) -> None:
    """`steps` local steps on a batch, from the base model; the live weights are written and not put back."""
    config = asked.replace(local_steps=steps)
    state = here.algorithm.start(config, here.replica.layout)
    model = state.published(config.coefficient_bits)
    work = replace(here.work(config, "0", here.data.clients[0], 1, model), batches=repeat(batch))
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
    """Seconds for the held-out set, from a short batch and the longest one."""
    batches = _heldout_batches(here, size)
    timed = [
        (_padded(here, batch), _seconds(here, partial(_evaluate, here, batch)))
        for batch in (batches[len(batches) // 4], batches[-1])
    ]
    line = Line(*timed)
    return sum(line.at(_padded(here, batch)) for batch in batches)


def _heldout_batches(here: Resident, size: int) -> list[list[int]]:
    """Numbers of the held-out samples as an evaluation makes batches of them: by length, the longest last."""
    samples = here.data.heldout
    ordered = sorted(range(len(samples)), key=lambda number: len(samples[number].input_ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _padded(here: Resident, batch: Sequence[int]) -> int:
    return len(batch) * max(len(here.data.heldout[number].input_ids) for number in batch)


def _evaluate(here: Resident, batch: Sequence[int]) -> None:
    """The loss of some held-out samples, and the accuracy of those that are questions, in one batch."""
    data = here.data
    questions = [data.questions.each[number] for number in batch] if data.questions.each else ()
    evaluate(here.language_model, [data.heldout[number] for number in batch], len(batch), questions=questions)


def _time_generation(here: Resident, config: RunConfig) -> float:
    """Seconds for all texts if every one is as long as it may be: the first token of a prompt, then token by token."""
    lm, prompts = here.language_model, _prompts(here, config)
    batches = prompt_batches(prompts, config.max_new_tokens, config.eval_batch_size, lm)
    middle = [prompts[index] for index in batches[len(batches) // 2]]
    few = min(config.max_new_tokens, 1 + TIMED_TOKENS)
    first = _seconds(here, lambda: greedy_texts(lm, middle, 1, config.eval_batch_size, ends=False))
    more = _seconds(here, lambda: greedy_texts(lm, middle, few, config.eval_batch_size, ends=False))
    each = max(0.0, more - first) / max(1, few - 1)
    return len(batches) * (first + each * (config.max_new_tokens - 1))


def _prompts(here: Resident, config: RunConfig) -> list[Sequence[int]]:
    """Of the held-out samples whose answers a run writes."""
    heldout, asked = here.data.heldout, config.generate_samples
    chosen = in_turn([sample.category for sample in here.data.heldout_samples], min(asked, len(heldout))) if asked else []
    return [heldout[number].input_ids[: heldout[number].prompt_length] for number in chosen]


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


def _peak_of_training(here: Resident, config: RunConfig, longest: Batch, besides: Needs) -> int:
    """Bytes while a client works on the longest batch, with the instruction that it was sent."""
    steps = 2 if config.client_steps > 1 else 1  # the state of an optimiser is there from the second on
    peak = peak_of(lambda: _local_update(here, config, steps, longest), here.language_model.device)
    return peak + (besides.down if here.language_model.device.type == "cpu" else 0)


def _peak_of_evaluation(here: Resident, config: RunConfig) -> int:
    longest = _heldout_batches(here, config.eval_batch_size)[-1]
    return peak_of(partial(_evaluate, here, longest), here.language_model.device)


def _peak_of_generation(here: Resident, config: RunConfig) -> int:
    """Bytes while the longest prompts are answered, with what the model keeps of the tokens still to come."""
    lm, prompts = here.language_model, _prompts(here, config)
    batches = prompt_batches(prompts, config.max_new_tokens, config.eval_batch_size, lm)
    largest = max(batches, key=lambda batch: len(batch) * max(len(prompts[index]) for index in batch))
    chosen = [prompts[index] for index in largest]
    few = min(config.max_new_tokens, 2)
    peak = peak_of(lambda: greedy_texts(lm, chosen, few, config.eval_batch_size, ends=False), lm.device)
    return peak + len(chosen) * (config.max_new_tokens - few) * _kept_of_a_token(lm.model)


def _kept_of_a_token(model: Any) -> int:
    """Bytes of the keys and values of one token; 0 of a model that does not say how many it has."""
    config: Any = model.config.get_text_config()

    def number(name: str) -> int:
        return int(getattr(config, name, None) or 0)

    heads = number("num_key_value_heads") or number("num_attention_heads")
    size = number("head_dim") or number("hidden_size") // max(1, number("num_attention_heads"))
    return 2 * number("num_hidden_layers") * heads * size * int(next(model.parameters()).element_size())
