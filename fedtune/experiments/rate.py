r"""A learning rate from measured slopes: where a zeroth-order step gains most, and beyond which it makes things worse.

A step along P directions z with E[z z^T] = I, whose slopes g = <z, grad L_a> were measured on a batch a, changes the expected
loss L by, to second order in the step,

    L(w - (lr/P) sum_p g_p z_p) - L(w)  ~  -(lr/P) sum_p g_p s_p  +  (lr/P)^2 / 2 sum_pq g_p g_q <z_p, H z_q>

where s = <z, grad L> is the true slope and H the Hessian of L. Three means are measured.

    S = E[g s] = E[g_a g_b]     signal: slopes of two independent batches along the same direction. Given z both have the mean
                                s, and independent errors, so that S = E[s^2] = |grad L|^2, and errors are not counted.
    Q = E[g^2]                  all that a step moves by, signal and noise: Q = S + Var(g | z). S / Q is the signal's share.
    C = E[<z, H z>]             curvature along a direction, the trace of H, by second differences.

With P directions of a step, the mean over z and batches is  -lr S + lr^2 Q C / (2 P),  which is least at

    lr* = P S / (Q C),          the gain there is S lr* / 2, and from lr_max = 2 lr* on a step makes things worse.

Left out: the correlation of g^2 with <z, H z> (relative size 2 / r, r = trace H / |H|, the effective rank), and the P (P - 1)
mixed terms g_p g_q <z_p, H z_q>, together (P - 1) / r of those counted: lr* grows with P only as long as P is below r.

Averaging over n clients with directions of their own (fedkseed, fedkseed-pro, fedzo) adds n independent steps of 1/n each,
which is a step along n P directions: the averaged model gains most at n lr*, though each client's own path is worse than where
it started from 2 lr* on. Where all clients share directions (decomfl) averaging removes noise but not curvature:

    lr = P S / ((S + (Q - S) / n) C)

All of it is of the model that was measured. The slopes fall as a run gets on, so a long run wants less than its first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedtune.directions.base import F64

ENOUGH = 2.0
"""Standard errors that the signal must be above zero to be told from noise."""


@dataclass(frozen=True)
class Measured:
    """A number with the standard error of its mean over directions (jackknife)."""

    value: float
    error: float


@dataclass(frozen=True)
class Rate:
    """What slopes say about the learning rate.

    Attributes:
        signal: S; square: Q; curvature: C; share: S / Q.
        step: lr*, least expected loss after one client's step; averaged: of the mean of a round's clients.
        slope: E|g|.
        ceiling: P (S + 2 errors) / (Q C): lr* is hardly larger, also where the signal is below its noise.
        directions: D of them; batches: m for each.
    """

    signal: Measured
    square: Measured
    curvature: Measured
    share: Measured
    step: Measured
    averaged: Measured
    slope: float
    ceiling: float
    directions: int
    batches: int

    @property
    def bends(self) -> bool:
        """Whether the loss curves upwards along directions, beyond the noise."""
        return self.curvature.value > ENOUGH * self.curvature.error

    @property
    def seen(self) -> bool:
        """Whether the signal is above its noise, and so `step` a number to use."""
        return self.bends and self.signal.value > ENOUGH * self.signal.error

    @property
    def largest(self) -> float:
        """lr_max, beyond which a client's step makes things worse."""
        return 2.0 * self.step.value


def rate(slopes: F64, curvatures: F64, *, per_step: int, clients: int, shared: bool) -> Rate:
    """Signal, noise, curvature and lr* (see above), with jackknife errors over the directions.

    S is the mean over directions of  ((sum_b g_b)^2 - sum_b g_b^2) / (m (m - 1)),  all pairs of different batches.

    Args:
        slopes: [D, m] slope along direction d on its batch b, D >= 2, m >= 2.
        curvatures: [D].
        per_step: P; clients: n of a round; shared: whether they use the same directions.
    """
    directions, batches = slopes.shape
    sums, squares = slopes.sum(axis=1), (slopes**2).sum(axis=1)
    parts = np.stack([(sums**2 - squares) / (batches * (batches - 1)), squares / batches, curvatures])

    def step(means: F64, signal: float | None = None) -> float:
        wanted = means[0] if signal is None else signal
        return _ratio(per_step * wanted, means[1] * means[2])

    def averaged(means: F64) -> float:
        if not shared:
            return clients * step(means)
        return _ratio(per_step * means[0], (means[0] + (means[1] - means[0]) / clients) * means[2])

    signal = _jackknife(parts, lambda means: means[0])
    return Rate(
        signal=signal,
        square=_jackknife(parts, lambda means: means[1]),
        curvature=_jackknife(parts, lambda means: means[2]),
        share=_jackknife(parts, lambda means: _ratio(means[0], means[1])),
        step=_jackknife(parts, step),
        averaged=_jackknife(parts, averaged),
        slope=float(np.abs(slopes).mean()),
        ceiling=step(parts.mean(axis=1), max(signal.value, 0.0) + ENOUGH * signal.error),
        directions=directions,
        batches=batches,
    )


def steps_to_move(part: float, *, learning_rate: float, rate: Rate, norm: float, weights: int, per_step: int) -> float:
    """Steps until the weights have moved by `part` of their norm: (part |w|)^2 / (lr^2 Q d / P).

    Directions are nearly orthogonal and of length sqrt(d), so a client's path is a random walk.
    """
    each = learning_rate**2 * rate.square.value * weights / per_step
    return (part * norm) ** 2 / each if each > 0.0 else math.inf


def _jackknife(parts: F64, of: Callable[[F64], float]) -> Measured:
    """`of` the means of `parts` [3, D], and its standard error: sqrt((D-1)/D sum (theta_i - mean theta)^2)."""
    count = parts.shape[1]
    total = parts.sum(axis=1)
    left_out = np.array([of((total - parts[:, i]) / (count - 1)) for i in range(count)])
    error = math.sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))
    return Measured(float(of(total / count)), error)


def _ratio(above: float, below: float) -> float:
    """above / below; 0 where nothing was measured to divide by, which `bends` says."""
    return float(above / below) if below else 0.0
