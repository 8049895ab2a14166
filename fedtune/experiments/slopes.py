"""Slopes and curvatures of the base model along random directions, on batches of the clients' data; nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedtune.coefficients import Coefficients, quantise
from fedtune.config import RunConfig
from fedtune.data.batches import Batch, client_batches
from fedtune.directions import Pool
from fedtune.directions.base import F64
from fedtune.errors import SweepError
from fedtune.experiments.rate import Rate, rate
from fedtune.methods import ZEROTH_ORDER
from fedtune.progress import EvaluationStep, check_stop, emit
from fedtune.resident import Resident
from fedtune.seeds import Stream, stream_key

LossAt = Callable[[int, int, Sequence[float]], list[float]]
"""(direction d, batch b, offsets c) -> the loss of the b-th batch of direction d at w + c z_d, for each c."""

WIDER, WIDEST = 10.0, 1000.0
"""Distance h of a second difference, in eps: where it begins, and beyond which it is not widened."""
ABOVE_NOISE = 50.0
"""Second differences are to be so many roundings of the loss; their error is sqrt(6) of them, 5 % then."""
TRIED, WIDENINGS = 4, 4  # directions on which h is chosen, and how often it may be tripled on the way to WIDEST


@dataclass(frozen=True)
class Points:
    """How much is measured: directions, and batches along each."""

    directions: int
    batches: int

    @property
    def passes(self) -> int:
        """Forward passes of `measure`: two a slope, three a curvature, and at most 32 that choose h."""
        return self.directions * (2 * self.batches + 3) + 2 * TRIED * WIDENINGS


MOST_WORK = 1.5e13
"""Weights x (tokens + DIRECTION_TOKENS) of all passes: 220 passes over 100 tokens on 135 million weights, which are 6 minutes
of processor time in float32."""
DIRECTION_TOKENS = 400
"""So many tokens of a pass take as long as the direction that it makes for all weights: 350 (float32) to 500 (bfloat16) in
processor time, with 135 million weights on two busy cores."""
POINTS = (Points(32, 8), Points(24, 8), Points(16, 8), Points(16, 6), Points(12, 6), Points(12, 4))
"""The first that is within MOST_WORK is used, the last in any case: an error over D directions is at least sqrt(2 / D) of the
signal, and with 8 hardly any signal would be ENOUGH of them."""


@dataclass(frozen=True)
class Slopes:
    """What was measured: float64 [D, m] slopes, float64 [D] curvatures, the distance h of these, the mean loss at w."""

    slopes: F64
    curvatures: F64
    distance: float
    loss: float


@dataclass(frozen=True)
class Advice:
    """A rate with what it was measured on: weights (number and norm), eps, the distance h, loss, clients a round, P."""

    rate: Rate
    weights: int
    norm: float
    eps: float
    distance: float
    loss: float
    clients: int
    per_step: int
    shared: bool


def measure(at: LossAt, *, directions: int, batches: int, eps: float, rounding: float) -> Slopes:
    """g = (L(w + eps z) - L(w - eps z)) / (2 eps) and, on the first batch, c = (L(w + hz) - 2 L(w) + L(w - hz)) / h^2.

    The second difference is h^2 c, and each loss in it carries a rounding error of about `rounding` |L|, so eps itself, which
    suits first differences, is too small: h begins at 10 eps and is tripled, up to 1000 eps, until the differences along the
    first few directions are 50 roundings large. Wider would leave the range where the loss is quadratic.

    Raises:
        SweepError: fewer than 2 directions or batches, or a loss that is not finite.
    """
    if directions < 2 or batches < 2:
        raise SweepError(f"Slopes need 2 directions and 2 batches at least, not {directions} and {batches}.")
    slopes = np.empty((directions, batches))
    for d in range(directions):
        for b in range(batches):
            check_stop()
            plus, minus = at(d, b, (eps, -eps))
            slopes[d, b] = (plus - minus) / (2.0 * eps)
            emit(EvaluationStep("slopes", d * batches + b + 1, directions * batches))
    losses = np.array([at(d, 0, (0.0,))[0] for d in range(directions)])
    h = _distance(at, losses[:TRIED], eps, rounding)
    curvatures = np.array([_bend(at, d, float(losses[d]), h) / h**2 for d in range(directions)])
    if not all(np.isfinite(array).all() for array in (slopes, losses, curvatures)):
        raise SweepError("A loss of the base model is not finite: look at model and data, or lower eps.")
    return Slopes(slopes, curvatures, h, float(losses.mean()))


def _distance(at: LossAt, losses: F64, eps: float, rounding: float) -> float:
    """h: see `measure`."""
    h = WIDER * eps
    while 3.0 * h <= WIDEST * eps:
        bends = [abs(_bend(at, d, float(loss), h)) for d, loss in enumerate(losses)]
        if np.mean(bends) >= ABOVE_NOISE * rounding * np.abs(losses).mean():
            break
        h *= 3.0
    return h


def _bend(at: LossAt, d: int, loss: float, h: float) -> float:
    plus, minus = at(d, 0, (h, -h))
    return plus - 2.0 * loss + minus


def advise(
    config: RunConfig, directions: int = 0, batches: int = 0, told: Callable[[Points, int], None] | None = None
) -> Advice:
    """Load model and data of `config`, measure, and say what follows for lr. Nothing is written; `lr` does not enter.

    Args:
        directions, batches: along each of them, at least 2; 0: by the size of the model.
        told: hears before anything is measured how much that will be, and how many weights the model has.

    Raises:
        SweepError: the algorithm computes gradients. FedtuneError: model or data cannot be used.
    """
    if config.algorithm not in ZEROTH_ORDER:
        raise SweepError(
            f"Slopes are what {', '.join(ZEROTH_ORDER)} step by; {config.algorithm} computes gradients, and has a range test."
        )
    here = Resident(config)
    here.load()
    points = _points(here, config, directions, batches)
    if told:
        told(points, here.replica.layout.numel)
    found = measure(
        _losses(here, config, points.directions),
        directions=points.directions,
        batches=points.batches,
        eps=config.eps,
        rounding=torch.finfo(here.replica.weights[0].dtype).eps,
    )
    asked, shared = config.invited_per_round, config.algorithm == "decomfl"
    return Advice(
        rate=rate(found.slopes, found.curvatures, per_step=config.directions_per_step, clients=asked, shared=shared),
        weights=here.replica.layout.numel,
        norm=float(sum(float(weight.detach().float().pow(2).sum()) for weight in here.replica.weights)) ** 0.5,
        eps=config.eps,
        distance=found.distance,
        loss=found.loss,
        clients=asked,
        per_step=config.directions_per_step,
        shared=shared,
    )


def _points(here: Resident, config: RunConfig, directions: int, batches: int) -> Points:
    """The first of POINTS that is within MOST_WORK for this model and data; what is asked for (not 0) stands."""
    lengths = [len(sample.input_ids) for samples in here.data.clients for sample in samples]
    one_pass = here.replica.layout.numel * (config.batch_size * float(np.mean(lengths)) + DIRECTION_TOKENS)
    fitting = next((points for points in POINTS if one_pass * points.passes <= MOST_WORK), POINTS[-1])
    return Points(directions or fitting.directions, batches or fitting.batches)


def _losses(here: Resident, config: RunConfig, directions: int) -> LossAt:
    """The losses of a resident model; batch b of direction d is drawn once, from a client drawn by its weight."""
    pool = Pool(config.family, stream_key(config.seed, "measured directions"), directions, rank=config.rank)
    base = quantise(pool, np.zeros((here.replica.layout.blocks, directions)), config.coefficient_bits)
    work = here.work(config, "0", here.data.clients[0], 0, Coefficients((base,)))
    drawn = _batches(here, config)
    batches: dict[tuple[int, int], Batch] = {}

    def at(d: int, b: int, offsets: Sequence[float]) -> list[float]:
        if (d, b) not in batches:
            batches[d, b] = next(drawn)
        return work.losses_at(batches[d, b], [(d, c) for c in offsets])

    return at


def _batches(here: Resident, config: RunConfig) -> Iterator[Batch]:
    """Batches of local steps, each of a client drawn as `weighting` weighs it."""
    samples, lm = here.data.clients, here.language_model
    weights = np.array([len(own) if config.weighting == "examples" else 1 for own in samples], dtype=np.int64)
    own = [
        client_batches(each, config.batch_size, Stream(config.seed, "measured batches", number), lm.tokenizer.pad_token_id)
        for number, each in enumerate(samples)
    ]
    clients = Stream(config.seed, "measured clients")
    while True:
        yield next(own[int(clients.weighted(weights, 1)[0])]).to(lm.device)
