"""Which settings belong to which algorithm, and what those are that depend on it: tables, without any of the mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Name = Literal[
    "fedkseed", "fedkseed-pro", "ferret", "subspace", "fedavg", "lora", "fedzo", "decomfl", "local", "central"
]  # fmt: skip
Scalar = bool | int | float | str

ZEROTH_ORDER = ("fedkseed", "fedkseed-pro", "fedzo", "decomfl")  # forward passes only
FIRST_ORDER = ("ferret", "subspace", "fedavg", "lora", "local", "central")  # gradients
SOME_COORDINATES = ("ferret", "subspace")  # messages have a few coordinates for each block
WHOLE_WEIGHTS = ("fedavg", "fedzo", "lora", "local", "central")  # messages have a number for every trained weight
ALONE = ("local", "central")  # one party trains: nothing is sent between parties

OWNERS: dict[str, tuple[str, ...]] = {  # the algorithms that a setting belongs to; those not named belong to all
    "eps": ZEROTH_ORDER,
    "directions_per_step": ZEROTH_ORDER,
    "server_lr": ("ferret", "subspace", "fedavg", "fedzo", "lora"),
    "anneal": ("ferret", "subspace", "fedavg", "fedzo", "lora"),
    "momentum": ("ferret",),
    "accumulate": FIRST_ORDER,
    "clip_norm": tuple(name for name in FIRST_ORDER if name != "subspace"),
    "pool_size": ("ferret", "subspace"),
    "blocks": ("ferret", "subspace"),
    "allocation": ("ferret", "subspace"),
    "reconstruction": ("ferret",),
    "coordinates": ("ferret", "subspace"),
    "lora_rank": ("lora",),
    "lora_alpha": ("lora",),
    "lora_targets": ("lora",),
    "only_client": ("local",),
}

_NO_POOL: dict[str, Scalar] = {"K": 1024, "family": "hadamard", "rank": 1, "pool_every": 0}
FIXED: dict[str, dict[str, Scalar]] = {  # what says nothing in an algorithm is recorded with one value; another one is refused
    **dict.fromkeys(("fedavg", "lora", "local", "central"), _NO_POOL),
    "subspace": {"coordinates": "shared"},
    "fedzo": {"K": 1024, "pool_every": 0},
    "decomfl": {"K": 1024, "pool_every": 1},
}

RATES = {  # lr that is not set, with optimizer sgd: docs/experiments.md has what it was chosen from
    **dict.fromkeys(("fedkseed", "fedkseed-pro", "decomfl", "fedzo"), 1e-5),
    "ferret": 1e-4,
    **dict.fromkeys(("fedavg", "local", "central"), 1e-3),
    "lora": 3e-2,
}
ADAMW_RATES = {"ferret": 1e-7, **dict.fromkeys(("fedavg", "local", "central"), 1e-5), "lora": 1e-3}
RELATIVE = {"subspace": 1e-2}  # relative to the weights, with every optimizer
MOMENTUM_PART = 0.1  # of sgd's rate: with local_momentum 0.9 a gradient moves the weights ten times as far in the end

USUAL: dict[str, Scalar] = {"optimizer": "sgd", "coordinates": "own"}  # where they are not set
USUAL_OF: dict[str, dict[str, Scalar]] = {"subspace": {"pool_every": 1}}  # of one algorithm

BITS = {"coefficient_bits": 8, "scalar_bits": 16}  # of messages that are not full weights


def default_bits(key: str, algorithm: object) -> int:
    """What `coefficient_bits` or `scalar_bits` is if it is not set."""
    return 32 if algorithm in WHOLE_WEIGHTS else BITS[key]


def default_rate(algorithm: str, optimizer: str) -> float:
    """What `lr` is if it is not set; 0 for what is no algorithm."""
    if algorithm in RELATIVE:
        return RELATIVE[algorithm]
    if optimizer == "adamw":
        return ADAMW_RATES.get(algorithm, 0.0)
    usual = RATES.get(algorithm, 0.0)
    return float(f"{usual * MOMENTUM_PART:.1g}") if optimizer == "momentum" else usual


def rates_in_words() -> str:
    """The default rates, for a description."""
    usual = f"{_by_rate(RATES)}; with optimizer momentum a tenth; with adamw {_by_rate(ADAMW_RATES)}"
    return f"{usual}; relative to the weights, with any optimizer: {_by_rate(RELATIVE)}"


def _by_rate(rates: Mapping[str, float]) -> str:
    return ", ".join(
        f"{' '.join(name for name, own in rates.items() if own == rate)} {rate:g}" for rate in dict.fromkeys(rates.values())
    )


def defaults_of(algorithm: str, optimizer: str) -> dict[str, Scalar]:
    """The settings that depend on the method, as they are where they are not set."""
    usual = {**USUAL, **USUAL_OF.get(algorithm, {})}
    bits = {key: default_bits(key, algorithm) for key in BITS}
    return {**bits, **usual, "lr": default_rate(algorithm, optimizer or str(usual["optimizer"])), **FIXED.get(algorithm, {})}


def filled(values: Mapping[str, Any], usual: str) -> dict[str, Any]:
    """The settings with those filled in that depend on the algorithm, which is `usual` if they name none."""
    algorithm = str(values.get("algorithm", usual))
    own = defaults_of(algorithm, str(values.get("optimizer", "")))
    left_open = {key: value for key, value in own.items() if key in FIXED.get(algorithm, {}) or not values.get(key)}
    return {**values, **left_open}
