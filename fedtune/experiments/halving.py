"""Early stop by successive halving: how far the runs of each rung go, and which combinations are carried on.

Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016,
arXiv 1502.07943. Rung i of R goes to  ceil(rounds * keep^(R - 1 - i))  rounds, and the best share `keep` of a rung is carried
on; with keep = 1/2 and R = 3 all combinations run a quarter of the rounds, half of them half, and a quarter all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedtune.config import RunConfig
from fedtune.errors import SweepError


def rungs(rounds: int, count: int, keep: float) -> tuple[int, ...]:
    """How many rounds the runs of each rung have at its end, rising; equal ones are one rung.

    >>> rungs(16, 3, 0.5), rungs(2, 3, 0.5), rungs(16, 3, 1.0)
    ((4, 8, 16), (1, 2), (16,))

    Raises:
        SweepError: `count` below 1, or `keep` not above 0 and up to 1.
    """
    if count < 1 or not 0.0 < keep <= 1.0:
        raise SweepError(f"Early stop takes --rungs of at least 1 and --keep above 0 and up to 1, not {count} and {keep}.")
    ends = (math.ceil(round(rounds * keep ** (count - 1 - rung), 9)) for rung in range(count))
    return tuple(sorted(set(ends)))


def survivors(losses: Mapping[str, float], keep: float) -> tuple[str, ...]:
    """The names that are carried on, best first: ceil(keep * number) of them, those with a loss that is not finite never.

    Of equal losses the one that stands first wins.

    >>> survivors({"a": 3.0, "b": 2.0, "c": float("nan")}, 0.5)
    ('b', 'a')
    """
    finite = [name for name, loss in losses.items() if math.isfinite(loss)]
    most = math.ceil(round(keep * len(losses), 9))
    return tuple(sorted(finite, key=lambda name: losses[name])[:most])


def why_no_early_stop(config: RunConfig) -> str:
    """Why runs of these settings cannot be carried on from a shorter run; "": they can."""
    if config.anneal == "none":
        return ""
    return (
        f"No early stop: anneal = {config.anneal} makes the number of rounds a part of the schedule, so a short run is not the "
        "beginning of a long one. Every combination runs all rounds."
    )
