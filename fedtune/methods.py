"""Which settings belong to which algorithm, and what those are that depend on it: tables, without any of the mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Scalar = bool | int | float | str

ZEROTH_ORDER = ("fedkseed", "fedkseed-pro", "fedzo", "decomfl")  # forward passes only
FIRST_ORDER = ("ferret", "fedavg", "lora", "local", "central")  # gradients
WHOLE_WEIGHTS = ("fedavg", "fedzo", "lora", "local", "central")  # messages have a number for every trained weight
ALONE = ("local", "central")  # one party trains: nothing is sent between parties

OWNERS: dict[str, tuple[str, ...]] = {  # the algorithms that a setting belongs to; those not named belong to all
    "eps": ZEROTH_ORDER,
    "directions_per_step": ZEROTH_ORDER,
    "server_lr": ("ferret", "fedavg", "fedzo", "lora"),
    "anneal": ("ferret", "fedavg", "fedzo", "lora"),
    "momentum": ("ferret",),
    "accumulate": FIRST_ORDER,
    "clip_norm": FIRST_ORDER,
    "pool_size": ("ferret",),
    "blocks": ("ferret",),
    "allocation": ("ferret",),
    "reconstruction": ("ferret",),
    "coordinates": ("ferret",),
    "lora_rank": ("lora",),
    "lora_alpha": ("lora",),
    "lora_targets": ("lora",),
    "only_client": ("local",),
}

_NO_POOL: dict[str, Scalar] = {"K": 1024, "family": "hadamard", "rank": 1, "pool_every": 0}
FIXED: dict[str, dict[str, Scalar]] = {  # what says nothing in an algorithm is recorded with one value; another one is refused
    **dict.fromkeys(("fedavg", "lora", "local", "central"), _NO_POOL),
    "fedzo": {"K": 1024, "pool_every": 0},
    "decomfl": {"K": 1024, "pool_every": 1},
}

BITS = {"coefficient_bits": 8, "scalar_bits": 16}  # of messages that are not full weights


def default_bits(key: str, algorithm: object) -> int:
    """What `coefficient_bits` or `scalar_bits` is if it is not set."""
    return 32 if algorithm in WHOLE_WEIGHTS else BITS[key]


def filled(values: Mapping[str, Any], usual: str) -> dict[str, Any]:
    """The settings with those filled in that depend on the algorithm, which is `usual` if they name none."""
    algorithm = str(values.get("algorithm", usual))
    bits = {key: values.get(key) or default_bits(key, algorithm) for key in BITS}
    return {**values, **bits, **FIXED.get(algorithm, {})}
