"""What a federated algorithm is: a frozen record of pure functions over a state of a few thousand numbers.

Server and client halves of one algorithm stand in one file (fedkseed.py, ferret.py) and read like the paper. They know
neither family nor device nor transport: directions are behind `fedtune.directions`, bytes behind `fedtune.wire`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from fedtune.coefficients import Coefficients, PoolCoefficients, quantise
from fedtune.config import RunConfig
from fedtune.data.batches import Batch
from fedtune.data.encode import Encoded
from fedtune.directions import Directions, Pool
from fedtune.directions.base import DISJOINT, F64, Floats
from fedtune.elementary import cosine_of_turns
from fedtune.layout import BlockRule, Layout
from fedtune.perturb import LiveWeights, Perturbation
from fedtune.seeds import stream_key
from fedtune.wire import Instruction, Kind, Update, update_length

I64 = npt.NDArray[np.int64]
PASS_TOKENS = 8192
"""Tokens, of all copies of a batch, in one pass over the model: enough to keep any device busy, few enough to fit it."""


@dataclass(frozen=True, eq=False)
class State:
    """Everything the server knows after a round.

    Attributes:
        round: rounds finished; 0 is the base model.
        closed: coefficients of the pools that are no longer added to.
        pool: the open pool.
        values: float64 [L, K], its coefficients before rounding to the grid; float32 where there is one for each weight.
        statistics: further arrays of the algorithm, by name (float64).
    """

    round: int
    closed: tuple[PoolCoefficients, ...]
    pool: Pool
    values: Floats
    statistics: Mapping[str, F64] = field(default_factory=dict)

    def published(self, bits: int) -> Coefficients:
        """The model of this state as every client rebuilds it; computed once."""
        found = _PUBLISHED.get(self)
        if found is None or found[0] != bits:
            found = _PUBLISHED[self] = bits, Coefficients((*self.closed, quantise(self.pool, self.values, bits)))
        return found[1]


_PUBLISHED: WeakKeyDictionary[State, tuple[int, Coefficients]] = WeakKeyDictionary()


class Start(Protocol):
    """Tensor `index` as it was before a client's local steps."""

    def __call__(self, index: int, out: torch.Tensor | None = None, /) -> torch.Tensor:
        """In `out`, a tensor of its shape and dtype, or in one of its own; not to be written then."""
        ...


class Moves(Protocol):
    """The weights that a client starts from, and the model along the directions of the open pool."""

    @property
    def scales(self) -> F64:
        """float64 [L]: the root mean square of each block's weights in the base model."""
        ...

    def move(self, moved: F64, /) -> None:
        """The live weights become those of the start with `moved` (float64 [L, K]) added to the open pool's coefficients."""
        ...


@dataclass(frozen=True)
class LocalWork:
    """What a client works on in a round; the weights are those of the instruction when `local_update` starts.

    Attributes:
        model: in evaluation mode. `weights` are its trainable tensors in layout order.
        loss: (model, batch) -> scalar tensor, mean loss over the response tokens.
        batches: endless.
        directions: of the instruction's open pool.
        perturbation: runs the model at w + c z without writing w.
        client: stable id; names the client's random streams.
        examples: training samples that the client owns.
        start: what each tensor was when `local_update` started, computed when it is asked for (see `Replica.start`);
            None: an algorithm that needs it copies the weights.
        losses: (model, batch, copies) -> the loss of each of so many copies of the batch, run as one batch, where the model
            may treat every copy differently; None: points are evaluated one by one.
        moves: the weights along the open pool's directions, from the base; None: an algorithm that needs it cannot work.
        deadline: moment of `time.monotonic` after which no further step is begun; the steps done are the update.
    """

    model: torch.nn.Module
    weights: Sequence[torch.nn.Parameter]
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor]
    batches: Iterator[Batch]
    directions: Directions
    perturbation: Perturbation
    client: str
    examples: int
    start: Start | None = None
    losses: Callable[[torch.nn.Module, Batch, int], torch.Tensor] | None = None
    moves: Moves | None = None
    deadline: float = math.inf

    @property
    def live(self) -> LiveWeights:
        """The weights as local steps write them."""
        return self.perturbation.live

    def in_time(self, done: int) -> bool:
        """Whether another step may be begun after `done` of them; the first always may."""
        return not done or time.monotonic() < self.deadline

    def losses_at(self, batch: Batch, points: Sequence[tuple[int, float]]) -> list[float]:
        """The loss of `batch` at w + c z_k for every (k, c) in `points`, in as few passes over the model as pay off."""

        def alone() -> torch.Tensor:
            return self.loss(self.model, batch)

        if self.losses is None:
            return self.perturbation.losses(self.directions, points, alone)
        several = partial(self.losses, self.model, batch)
        most = max(2, PASS_TOKENS // batch.input_ids.numel())
        parts = [points[a : a + most] for a in range(0, len(points), most)]
        return [loss for part in parts for loss in self.perturbation.losses(self.directions, part, alone, several)]


@dataclass(frozen=True)
class Algorithm:
    """One federated algorithm.

    Attributes:
        name: as in the configuration.
        kind: of the updates its clients send.
        block_rule: which parameters share coefficients.
        pool_size: seeds in a pool, given the configuration and the layout.
        statistics: zero-filled arrays that the algorithm keeps beside the coefficients, by name and shape.
        draw_weights: uint16 [K] or empty: what a client needs to know about the seeds.
        most_numbers: scalars, coordinates or weights that an update has at most.
        local_update: the client's half of a round.
        aggregate: the server's half: state, updates by client id -> state. Must not depend on the order of arrival.
        counts: int64 [L]: coordinates of each block that every client is asked for, or empty: clients choose, or send none.
        check_update: refuses a finished update that `local_update` cannot have made, with a WireError; wire.py has checked
            lengths and ranges. Live server and replay both call it.
        lasting: names of the statistics that outlive a pool.
        family: of its pools; "": that of the settings.
        adapt: what is done to the loaded base model before its trainable parameters are laid out.
        merge: (tuned model) -> the same as an ordinary model of its architecture, to be saved.
        samples: those that the client with a given number trains on, of the shares of all.
    """

    name: str
    kind: Kind
    block_rule: Callable[[RunConfig], BlockRule]
    pool_size: Callable[[RunConfig, Layout], int]
    statistics: Callable[[int, int], dict[str, F64]]
    draw_weights: Callable[[State], np.ndarray[tuple[int], np.dtype[np.uint16]]]
    most_numbers: Callable[[RunConfig, Layout], int]
    local_update: Callable[[LocalWork, RunConfig, Instruction], Update]
    aggregate: Callable[[State, Mapping[str, Update], RunConfig, Layout], State]
    counts: Callable[[State, RunConfig, Layout], I64] = lambda state, config, layout: np.zeros(0, dtype=np.int64)
    check_update: Callable[[Update, RunConfig, Layout], None] = lambda update, config, layout: None
    lasting: tuple[str, ...] = ()
    family: str = ""
    adapt: Callable[[torch.nn.Module, RunConfig], torch.nn.Module] = lambda model, config: model
    merge: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model
    samples: Callable[[Sequence[Sequence[Encoded]], int], Sequence[Encoded]] = lambda shares, number: shares[number]

    def family_of(self, config: RunConfig) -> str:
        """The family of its pools."""
        return self.family or config.family

    def pool(self, config: RunConfig, layout: Layout, number: int) -> Pool:
        """Pool `number` (from 0) of a run; every party derives the same one."""
        family, size = self.family_of(config), self.pool_size(config, layout)
        if family in DISJOINT:
            return Pool(family, 0, size)  # not random: the same for all runs
        return Pool(family, stream_key(config.seed, "pool", number), size, rank=config.rank)

    def value_type(self, config: RunConfig) -> np.dtype[Any]:
        """Of the coefficients before rounding: float32 where there is one for each weight, which has no more bits itself."""
        return np.dtype(np.float32 if self.family_of(config) in DISJOINT else np.float64)

    def longest_update(self, config: RunConfig, layout: Layout) -> int:
        """Bytes of an update at most; a longer message is none."""
        blocks = layout.blocks if self.kind == Kind.COORDINATES else 0
        own = config.coordinates != "shared"
        return update_length(self.most_numbers(config, layout), config.scalar_bits, blocks=blocks, with_counts=own)

    def start(self, config: RunConfig, layout: Layout) -> State:
        """State 0: the base model."""
        pool = self.pool(config, layout, 0)
        values = np.zeros((layout.blocks, pool.size), dtype=self.value_type(config))
        return State(0, (), pool, values, self.statistics(layout.blocks, pool.size))

    def begin_round(self, state: State, config: RunConfig, layout: Layout) -> State:
        """The state that the next round starts from: with a fresh pool if the schedule says so."""
        number = pool_number(config, state.round + 1)
        if number == len(state.closed):
            return state
        closed = state.published(config.coefficient_bits).pools[-1]
        pool = self.pool(config, layout, number)
        fresh = self.statistics(layout.blocks, pool.size)
        fresh |= {name: state.statistics[name] for name in self.lasting}
        return replace(state, closed=(*state.closed, closed), pool=pool, values=np.zeros_like(state.values), statistics=fresh)


def pool_number(config: RunConfig, round: int) -> int:
    """Which pool (from 0) round `round` (from 1) uses."""
    return (round - 1) // config.pool_every if config.pool_every else 0


def most_pools(config: RunConfig, round: int) -> int:
    """Pools that the model before round `round` (from 1) has at most: fewer if rounds changed nothing."""
    return pool_number(config, max(1, min(round, config.rounds))) + 1


def server_rate(config: RunConfig, round: int) -> float:
    """The server's learning rate in round `round` (from 1): constant, or falling from server_lr towards 0 by the end.

    The schedules of Ferret's official code with its slr_max = server_lr and slr_min = 0.
    """
    done = (round - 1) / config.rounds
    falling = 0.5 * (1.0 + float(cosine_of_turns(np.array(0.5 * done))))
    return config.server_lr * {"none": 1.0, "linear": 1.0 - done, "cosine": falling}[config.anneal]


def no_draw_weights(state: State) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Every seed is as likely as any other."""
    return np.zeros(0, dtype=np.uint16)


def no_statistics(blocks: int, size: int) -> dict[str, F64]:
    """Nothing is kept beside the coefficients."""
    return {}


def shares(updates: Mapping[str, Update], config: RunConfig) -> dict[str, float]:
    """Weights of the updates, by client id in sorted order, summing to one.

    A client that did only a part of its steps counts by that part: c_i ~ n_i * steps_i / tau, or ~ steps_i / tau when
    clients are weighted equally.
    """
    raw = {
        client: (updates[client].examples if config.weighting == "examples" else 1)
        * updates[client].steps
        / config.client_steps
        for client in sorted(updates)
    }
    total = sum(raw.values())
    return {client: share / total for client, share in raw.items()} if total else {}
