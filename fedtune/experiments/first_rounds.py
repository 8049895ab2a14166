"""What a round of a first-order method does to the loss of clients' training samples, at any rate; for the range test.

A round is the method's own: its clients' local steps, the projection and rebuild of Ferret, the server's step, the mean over
clients. Of each client's samples every fourth is set aside: rounds train on the others, and the loss is that of some set aside.
The held-out set is not read. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedtune.algorithms.base import server_rate
from fedtune.algorithms.change import Change
from fedtune.algorithms.first_order import descend
from fedtune.coefficients import Coefficients, PoolCoefficients, quantise
from fedtune.config import RunConfig
from fedtune.data.encode import Encoded
from fedtune.directions import Pool
from fedtune.divergence import blown_up
from fedtune.errors import SweepError
from fedtune.evaluation import evaluate
from fedtune.experiments.rate_range import Found, Tried, search
from fedtune.methods import FIRST_ORDER, WHOLE_WEIGHTS
from fedtune.replay import Rules
from fedtune.resident import Resident
from fedtune.seeds import Stream, stream_key
from fedtune.wire import Instruction, Status

ASIDE = 4  # of so many samples of a client one is set aside
MOST_WORK = 4e11
"""Weights x tokens of all steps at one rate: 30 steps of 100 tokens on 135 million weights, half a minute on two cores."""
EVALUATED = 4  # samples in a batch of an evaluation, which changes no loss


@dataclass(frozen=True)
class Size:
    """How much is done at each rate: rounds, clients of each, local steps of each client, samples whose loss is measured."""

    rounds: int
    clients: int
    steps: int
    samples: int

    def within(self, other: Size) -> Size:
        """The lesser of each."""
        pairs = zip((self.rounds, self.clients, self.steps, self.samples), _numbers(other), strict=True)
        return Size(*(min(pair) for pair in pairs))


SIZES = (Size(4, 4, 100, 32), Size(4, 4, 25, 32), Size(4, 2, 20, 24), Size(4, 1, 20, 16), Size(4, 1, 8, 12), Size(4, 1, 5, 8))
"""The first that is within MOST_WORK is used, the last in any case."""


@dataclass(frozen=True)
class Advice:
    """What was found, and how: `size` at each rate, of the `whole` round of the settings; `loss` of the base model."""

    found: Found
    size: Size
    whole: Size
    loss: float
    scale: float

    @property
    def recommended(self) -> float:
        """The careful rate (see `Found`), for all local steps of a round (see `for_all_steps`)."""
        return self.found.careful.rate * self.scale


def advise(config: RunConfig, rounds: int = 0, told: Callable[[Tried], None] | None = None) -> Advice:
    """Load model and data of `config` and run the range test; `told` hears of every rate as soon as it was tried.

    Args:
        rounds: at each rate, at least 2; 0: by the size of the model.

    Raises:
        SweepError: the algorithm computes no gradients, or the clients have too few samples. FedtuneError: model or data cannot
            be used. Interrupted: Ctrl-C.
    """
    if config.algorithm not in FIRST_ORDER:
        raise SweepError(f"A range test is for {', '.join(FIRST_ORDER)}; {config.algorithm} measures slopes.")
    here = Resident(config)
    here.load()
    whole = _whole(config)
    size = _size(here, config, whole)
    runs = Rounds(here, config, replace(size, rounds=rounds or size.rounds))

    def tried(rate: float) -> Tried:
        found = runs.tried(rate)
        if told:
            told(found)
        return found

    found = search(tried, config.lr)
    return Advice(found, runs.size, whole, runs.loss, for_all_steps(config, size.steps))


def for_all_steps(config: RunConfig, steps: int) -> float:
    """What a rate measured with `steps` local steps is multiplied with for a round of all of them.

    The error of Ferret's rebuild is in proportion to the length of the update, which is lr times the number of steps: that
    product is what was measured. The other methods take the steps themselves.
    """
    return steps / config.client_steps if config.algorithm == "ferret" else 1.0


def _whole(config: RunConfig) -> Size:
    return Size(SIZES[0].rounds, config.invited_per_round, config.client_steps, SIZES[0].samples)


def _size(here: Resident, config: RunConfig, whole: Size) -> Size:
    """The first of SIZES that is within MOST_WORK for this model and data, and no more than a round of `config` has."""
    lengths = [len(sample.input_ids) for samples in here.data.clients for sample in samples]
    weights = sum(parameter.numel() for parameter in here.language_model.model.parameters())
    step = weights * config.batch_size * config.accumulate * float(np.mean(lengths))
    fitting = [size.within(whole) for size in SIZES]
    return next((one for one in fitting if step * one.rounds * one.clients * one.steps <= MOST_WORK), fitting[-1])


def _numbers(size: Size) -> tuple[int, ...]:
    return size.rounds, size.clients, size.steps, size.samples


class Rounds:
    """Rounds from the base model, numbered from 1: each has clients, batches, directions and measured samples of its own."""

    def __init__(self, here: Resident, config: RunConfig, size: Size) -> None:
        self.here = here
        alone = {"clients_per_round": 1} if config.algorithm == "central" else {}
        self.config = config.replace(local_steps=size.steps, **alone)
        self.rules = Rules(self.config, here.replica.layout, here.replica.fingerprint)
        self._trained, self._aside = self._divided()
        self.size = replace(size, clients=min(size.clients, len(self._trained)))
        self._base = Coefficients((self._no_pool(),))
        self._before: dict[int, float] = {}

    @property
    def loss(self) -> float:
        """Mean of the base model over the measured rounds."""
        return float(np.mean([self._loss_before(number) for number in self._numbers()]))

    def tried(self, rate: float) -> Tried:
        """All rounds at `rate`; one that diverges is the last."""
        changes: list[float] = []
        for number in self._numbers():
            changes.append(self.change(rate, number))
            if not math.isfinite(changes[-1]):
                break
        return Tried(rate, tuple(changes))

    def change(self, rate: float, number: int) -> float:
        """Of the loss by round `number`; infinite where it blew up, or a step was not finite."""
        before = self._loss_before(number)
        if not self._train(self.config.replace(lr=rate), number):
            return math.inf
        after = self._loss(number)
        return math.inf if blown_up(after, before) else after - before

    # ------------------------------------------------------------------ samples

    def _divided(self) -> tuple[list[Sequence[Encoded]], list[Encoded]]:
        """What each client trains on, and what is set aside of all. Raises SweepError if that is nothing."""
        algorithm, shares = self.here.algorithm, self.here.data.clients
        count = 1 if self.config.algorithm == "central" else len(shares)
        own = [algorithm.samples(shares, number) for number in range(count)]
        aside = [sample for samples in own for sample in samples[ASIDE - 1 :: ASIDE]]
        if not aside:
            raise SweepError(f"No client has {ASIDE} samples, so none can be set aside to measure on: sweep lr instead.")
        return [[one for place, one in enumerate(samples) if place % ASIDE < ASIDE - 1] for samples in own], aside

    def _clients(self, number: int) -> list[int]:
        """Who takes part in round `number`: distinct, by named stream; of a method with one party, that one."""
        if self.config.algorithm == "local":
            asked = self.config.only_client
            return [int(asked) if asked.isdecimal() and int(asked) < len(self._trained) else 0]
        chosen = Stream(self.config.seed, "measured clients", number).subset(len(self._trained), self.size.clients)
        return [int(client) for client in chosen]

    def _loss_before(self, number: int) -> float:
        if number not in self._before:
            self.here.replica.become(self._base)
            self._before[number] = self._loss(number)
            if not math.isfinite(self._before[number]):
                raise SweepError("The loss of the base model on clients' samples is not finite: look at model and data.")
        return self._before[number]

    def _loss(self, number: int) -> float:
        """Of the live weights, on samples set aside that the order of the round begins with."""
        order = Stream(self.config.seed, "measured samples", number).permutation(len(self._aside))[: self.size.samples]
        return evaluate(self.here.language_model, [self._aside[int(place)] for place in order], EVALUATED).loss

    # ------------------------------------------------------------------ a round

    def _train(self, config: RunConfig, number: int) -> bool:
        """Bring the live weights to the model after the round; False: a client's steps were not finite."""
        whole = config.algorithm in WHOLE_WEIGHTS
        return self._averaged(config, number) if whole else self._rebuilt(config, number)

    def _rebuilt(self, config: RunConfig, number: int) -> bool:
        """Updates in coordinates, which the server adds up, and the model that everybody rebuilds from them."""
        rules, algorithm = replace(self.rules, config=config), self.here.algorithm
        state = replace(rules.start(), round=number - 1, pool=algorithm.pool(config, rules.layout, number - 1))
        model = state.published(config.coefficient_bits)
        digest = model.digest(rules.fingerprint)
        instruction = Instruction(
            number,
            rules.fingerprint,
            rules.layout.digest,
            digest,
            0,
            model.pools,
            algorithm.draw_weights(state),
            rules.counts(state).astype(np.uint16),
        )
        updates = {}
        for client in self._clients(number):
            work = self.here.work(config, str(client), self._trained[client], number, model)
            update = updates[str(client)] = algorithm.local_update(work, config, instruction)
            if update.status != Status.FINISHED:
                return False
        after = algorithm.aggregate(state, updates, config, rules.layout).published(config.coefficient_bits)
        self.here.replica.become(after)
        return True

    @torch.no_grad()
    def _averaged(self, config: RunConfig, number: int) -> bool:
        """Every weight moves by the mean of the clients' changes, in float32 whatever the bits of a message."""
        replica, clients = self.here.replica, self._clients(number)
        total = [torch.zeros_like(weight, dtype=torch.float32) for weight in replica.weights]
        sizes = np.array([len(self._trained[client]) if config.weighting == "examples" else 1 for client in clients])
        for client, share in zip(clients, (sizes / sizes.sum()).tolist(), strict=True):
            work = self.here.work(config, str(client), self._trained[client], number, self._base)
            with torch.enable_grad():
                _, finite = descend(work, config)
            if not finite:
                return False
            for mean, delta in zip(total, Change.of(work), strict=True):
                mean.add_(delta, alpha=share)
        replica.become(self._base)
        replica.touch()
        for weight, mean in zip(replica.weights, total, strict=True):
            weight.copy_(weight.float().add_(mean, alpha=server_rate(config, 1)))
        return True

    def _no_pool(self) -> PoolCoefficients:
        """The base model as a pool of two seeds with no coefficients, whatever the size of the method's own."""
        pool = Pool("hadamard", stream_key(self.config.seed, "measured directions"), 2)
        return quantise(pool, np.zeros((self.here.replica.layout.blocks, 2)), 8)

    def _numbers(self) -> range:
        return range(1, self.size.rounds + 1)
