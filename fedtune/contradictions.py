"""Settings that exclude each other: what is refused at the door, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedtune.choices import check_choices
from fedtune.errors import ConfigError, ContradictionError
from fedtune.foreign import client_id
from fedtune.methods import FIXED, OWNERS, SOME_COORDINATES, WHOLE_WEIGHTS, ZEROTH_ORDER, Scalar, defaults_of

if TYPE_CHECKING:
    from fedtune.config import RunConfig


def refuse_overwritten(asked: Mapping[str, Scalar], usual: Mapping[str, Scalar]) -> None:
    """Raise ContradictionError for a setting that was asked for and that the algorithm has one value for, another one.

    Args:
        asked: every setting, with its default where none was given; usual: the defaults.
    """
    algorithm = str(asked["algorithm"])
    for key, fixed in FIXED.get(algorithm, {}).items():
        if asked[key] not in (fixed, usual[key]):
            raise ContradictionError(
                f"{key} = {asked[key]} says nothing in {algorithm}, which has no seed pool to choose: remove it."
                if algorithm in WHOLE_WEIGHTS
                else f"{key} = {asked[key]} does not go with {algorithm}, where it is {fixed}: remove it."
                if algorithm in SOME_COORDINATES
                else f"{key} = {asked[key]} says nothing in {algorithm}, whose directions are new in every round: remove it.",
                key=key,
            )


def refuse_contradictions(config: RunConfig) -> None:
    """Raise ContradictionError for the first that is found."""
    if config.clients_per_round > config.clients:
        raise ContradictionError(
            f"clients_per_round = {config.clients_per_round} but there are only {config.clients} clients: "
            "lower clients_per_round or raise clients.",
            clients_per_round=config.clients_per_round,
            clients=config.clients,
        )
    if config.min_replies > config.invited_per_round:
        raise ContradictionError(
            f"min_replies = {config.min_replies} but a round asks {config.invited_per_round} clients: "
            "lower min_replies, or raise clients_per_round or over_selection.",
            min_replies=config.min_replies,
            invited=config.invited_per_round,
        )
    if config.min_clients > config.clients:
        raise ContradictionError(f"min_clients = {config.min_clients} but there are only {config.clients} clients: lower it.")
    if config.holdout_category and config.holdout_file:
        raise ContradictionError("holdout_category and holdout_file exclude each other: keep one of them.")
    if config.optimizer != "sgd" and not config.first_order:
        raise ContradictionError(
            f"optimizer = {config.optimizer} needs gradients, which {config.algorithm} does not have: "
            "remove it, or use algorithm = ferret.",
            optimizer=config.optimizer,
        )
    if config.local_momentum != 0.9 and config.optimizer != "momentum":
        raise ContradictionError(
            f"local_momentum belongs to optimizer = momentum, not to {config.optimizer}: remove it.",
            local_momentum=config.local_momentum,
        )
    check_choices(config.choices)
    if config.only_client:
        client_id(config.only_client, ConfigError, "change only_client")
    _refuse_foreign(config)
    _check_places(config)
    _check_sizes(config)
    if config.algorithm in SOME_COORDINATES:
        if config.momentum and config.pool_every:
            raise ContradictionError(
                "momentum adds coordinates of successive rounds, so it needs one pool: set pool_every = 0 or momentum = 0."
            )
        if config.coordinates == "shared" and config.allocation == "official":
            raise ContradictionError(
                "allocation = official is the client's own choice, and coordinates are shared: remove one of them.",
                key="coordinates",
            )
        if config.allocation == "official" and config.pool_size:
            raise ContradictionError(
                f"allocation = official takes K = {config.K} as the size of the pool: remove pool_size.",
                K=config.K,
                pool_size=config.pool_size,
            )


def _check_places(config: RunConfig) -> None:
    """Where the weights are and what they are rounded to."""
    if config.update_rounding != "nearest" and config.dtype == "float32":
        raise ContradictionError(
            f"update_rounding = {config.update_rounding} is for 16-bit weights: "
            "remove it, or set dtype to bfloat16 or float16.",
            update_rounding=config.update_rounding,
        )
    if config.update_rounding == "master" and config.algorithm == "subspace":
        raise ContradictionError(
            "update_rounding = master keeps a float32 copy of the weights, and subspace computes them from the base in every "
            "step: remove it, or use stochastic.",
            update_rounding=config.update_rounding,
        )
    if config.offload and config.first_order:
        raise ContradictionError(
            f"offload is for passes without gradients, and {config.algorithm} needs them: "
            "remove it, or use algorithm = fedkseed."
        )
    if config.offload and (config.device_map != "none" or config.update_rounding == "master"):
        other = "device_map" if config.device_map != "none" else "update_rounding = master"
        raise ContradictionError(f"offload and {other} exclude each other: keep one of them.")
    if config.device_map != "none" and config.device not in ("auto", "cuda"):
        raise ContradictionError(
            f"device_map places the model itself, so device = {config.device} says nothing: remove one of them.",
            device=config.device,
        )


def _refuse_foreign(config: RunConfig) -> None:
    """A setting of another algorithm or family would be recorded and change nothing, so it is refused."""
    own = defaults_of(config.algorithm, config.optimizer)
    for key, owners in OWNERS.items():
        if config.algorithm not in owners and getattr(config, key) != own.get(key, type(config).model_fields[key].default):
            by_definition = key in ("server_lr", "anneal") and config.algorithm in ZEROTH_ORDER
            reason = " (its model is w0 - lr * sum A_k z_k by definition)" if by_definition else ""
            raise ContradictionError(
                f"{key} belongs to {' and '.join(owners)}, not to {config.algorithm}{reason}: remove it.", key=key
            )
    if config.rank != 1 and config.family != "lowrank":
        raise ContradictionError(
            f"rank belongs to family lowrank, not to {config.family}: remove it or set family = lowrank.", key="rank"
        )


def _check_sizes(config: RunConfig) -> None:
    """What messages and pools have room for."""
    most = 32 if config.algorithm in WHOLE_WEIGHTS else 24
    if not 2 <= config.coefficient_bits <= most:
        raise ContradictionError(
            f"coefficient_bits = {config.coefficient_bits}, but {config.algorithm} has 2 to {most}: change it, or remove it.",
            coefficient_bits=config.coefficient_bits,
        )
    least = 1 if config.algorithm in SOME_COORDINATES else 16 if config.algorithm in WHOLE_WEIGHTS else 8
    if config.scalar_bits < least:
        raise ContradictionError(
            f"scalar_bits = {config.scalar_bits}, but {config.algorithm} needs {least} at least (coordinates share a unit, and "
            "can have 1; scalars one by one 8; weights 16): change it, or remove it.",
            scalar_bits=config.scalar_bits,
        )
    fresh = config.local_steps * config.directions_per_step
    if config.algorithm in ("fedzo", "decomfl") and fresh > 65536:
        raise ContradictionError(
            f"{config.algorithm} draws local_steps x directions_per_step = {fresh} directions in a round; a pool has 65536: "
            "lower one of them.",
            directions=fresh,
        )
