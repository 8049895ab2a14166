"""Which clients a round asks: drawn by a named stream from stable client ids, never from Flower's random node ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedtune.config import RunConfig
from fedtune.errors import RunError
from fedtune.seeds import LARGEST_BOUND, Stream


def sample_clients(config: RunConfig, round: int, examples: Mapping[str, int], attempt: int = 1) -> tuple[str, ...]:
    """Ids of the clients of a round, sorted, `config.invited_per_round` of them without replacement.

    Args:
        round: from 1; another `attempt` at it (from 1) draws afresh.
        examples: training samples of each known client; with sampling = "examples" a client's chance grows with them.

    Where one party trains alone it is `only_client`, or the first. Raises RunError if it is none of them, or if the samples of
    all are too many to draw one.
    """
    known = sorted(examples, key=natural_order)
    if config.alone:
        return (_only(config, known),)
    size = min(config.invited_per_round, len(known))
    again = (attempt,) if attempt > 1 else ()
    stream = Stream(config.seed, "clients", round, *again)
    if config.sampling == "examples":
        _check_sum(examples)
        chosen = stream.weighted_subset(np.array([examples[client] for client in known], dtype=np.int64), size)
    else:
        chosen = stream.subset(len(known), size)
    return tuple(known[index] for index in chosen.tolist())


def _check_sum(examples: Mapping[str, int]) -> None:
    """Refuse more samples than one of them can be drawn from."""
    if (total := sum(examples.values())) > LARGEST_BOUND:
        raise RunError(f"The clients say that they have {total} samples together: lower max_examples, or sampling = uniform.")


def _only(config: RunConfig, known: Sequence[str]) -> str:
    """The party that trains alone."""
    if config.only_client and config.only_client not in known:
        raise RunError(
            f"only_client = '{config.only_client}' is none of the clients ({', '.join(known[:8])}): name one of them.",
            only_client=config.only_client,
        )
    return config.only_client or known[0]


def natural_order(client: str) -> tuple[int, str]:
    """Sort key: "2" before "10"."""
    return (len(client), client)
