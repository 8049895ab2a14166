"""What a range test says about the learning rate of a first-order method, in plain English."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from fedtune.config import RunConfig

if TYPE_CHECKING:
    from fedtune.experiments.first_rounds import Advice
    from fedtune.experiments.rate_range import Tried

UNKNOWN = (
    "not in it: later rounds (the best rate falls as a run gets on; of rates that are as good take the lower), and the "
    "held-out set, which was not read"
)


def tried_line(one: Tried) -> str:
    """A rate and what its rounds did."""
    if one.diverged:
        return f"lr {one.rate:g}: diverged in round {len(one.changes)}"
    error = f"standard error {one.error:.1g} over {len(one.changes)} rounds"
    return f"lr {one.rate:g}: loss {one.mean:+.4f} in a round ({error})"


def range_lines(advice: Advice, config: RunConfig) -> list[str]:
    """What was done, what follows for lr, and what is not known."""
    size, found = advice.size, advice.found
    clients = "1 client" if size.clients == 1 else f"{size.clients} clients"
    lines = [
        f"range test: at each rate {size.rounds} rounds from the base model, each of {clients} x {size.steps} steps, measured "
        f"on {size.samples} training samples set aside, other ones each round (loss {advice.loss:.4f})"
    ]
    return [*lines, *(_rate_lines(advice, config) if found.best.gains else _unseen_lines(advice)), *_less(advice), UNKNOWN]


def _rate_lines(advice: Advice, config: RunConfig) -> list[str]:
    found, scale = advice.found, advice.scale
    low, high = found.as_good
    noise = "the noise tells it from the others"
    if low < high:
        noise = f"from {low * scale:g} to {high * scale:g} the noise tells no difference"
    lines = [
        f"recommended lr: {advice.recommended:g} for many rounds; a single one gains most at {found.best.rate * scale:g} "
        f"({noise}); this preset has lr {config.lr:g}"
    ]
    if found.harmful:
        lines.append(f"from {found.harmful * scale:g} on a round makes things worse")
    if found.at_the_end:
        lines.append("it is at the end of the rates that were tried: set lr nearer to it and measure again")
    return lines


def _unseen_lines(advice: Advice) -> list[str]:
    low, high = advice.found.tried[0].rate, advice.found.tried[-1].rate
    guess = f"; at a guess {advice.recommended:g}" if advice.found.best.mean < 0.0 else ""
    return [
        f"no recommendation: at no rate from {low:g} to {high:g} does the loss fall beyond its noise{guess}. Measure more "
        "(--repeats), or sweep lr"
    ]


def _less(advice: Advice) -> list[str]:
    """What was less than a round of the settings, and what that does to the rate."""
    size, whole = advice.size, advice.whole
    lines = []
    if size.steps < whole.steps:
        what = (
            f"the rates tried were {1.0 / advice.scale:.3g} times as high, since the error of a rebuild grows with lr x steps"
            if advice.scale < 1.0
            else "more steps may want a lower rate"
        )
        lines.append(f"measured with {size.steps} of {whole.steps} local steps, for time: {what}")
    if size.clients < whole.clients:
        lines.append(
            f"measured with {size.clients} of {whole.clients} clients a round: the mean of more has less noise and may bear a "
            "higher rate"
        )
    return lines


def as_json(advice: Advice) -> dict[str, object]:
    """As JSON types; a change that is not finite is null."""
    found = advice.found
    return {
        "recommended": advice.recommended if found.best.gains else None,
        "as_good": [rate * advice.scale for rate in found.as_good],
        "harmful": found.harmful and found.harmful * advice.scale,
        "loss": advice.loss,
        "tried": [{"lr": one.rate, "change": _finite(one.mean), "error": _finite(one.error)} for one in found.tried],
        "measured": asdict(advice.size),
        "round": asdict(advice.whole),
        "scale": advice.scale,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
