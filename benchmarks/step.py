"""Benchmark step: a FedKSeed local step on a random Llama against the official step and against two plain forward passes.

Both run from the same folder on models of their own. The official code computes the logits of all positions; ours, and the
plain passes, those of the response only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import official
from benchmarks.measure import Case, Options, Row, alternate
from benchmarks.models import Client, Size, batch, forward, models, sample, save_random
from fedtune.config import RunConfig
from fedtune.models import load_model

TARGETS = {"hadamard": 1.25, "lowrank": 1.1, "rademacher": None, "gaussian": None}
"""By family: at most so many times two plain forward passes."""
TOGETHER = 8
"""Directions a step of `lowrank`, both points of each in passes over copies of the batch, against as many plain passes."""


def step(options: Options) -> Iterator[Row]:
    """Milliseconds a step, for each family that has kernels; those with a target also on the larger model."""
    for name, size in models(options).items():
        with tempfile.TemporaryDirectory() as folder:
            parameters = save_random(size, Path(folder))
            conditions = f"{parameters / 1e6:.1f} M parameters, 1 x {size.tokens} tokens, float32"
            suffix = "-135M" if name == "135M" else ""
            for family, target in TARGETS.items():
                if target or not suffix:
                    config = _config(folder, size, family, 1, options)
                    yield _row(f"step.{family}{suffix}", config, size, conditions, options)
            config = _config(folder, size, "lowrank", TOGETHER, options)
            yield _row(f"step.lowrank-{TOGETHER}{suffix}", config, size, conditions, options)


def _config(folder: str, size: Size, family: str, directions: int, options: Options) -> RunConfig:
    return RunConfig(
        model=folder,
        family=family,
        K=options.pool,
        local_steps=size.steps if directions == 1 else 1,
        directions_per_step=directions,
        lr=1e-7,
        eps=5e-4,
        device=str(options.device),
        threads=options.threads,
        max_length=size.tokens,
    )


def _row(name: str, config: RunConfig, size: Size, conditions: str, options: Options) -> Row:
    client = Client(config, (sample(size.tokens),))
    inputs = batch(size.tokens).to(client.device)
    theirs = load_model(config).model
    weights = list(theirs.parameters())
    steps, directions = config.local_steps, config.directions_per_step

    @torch.no_grad()
    def official_loss() -> torch.Tensor:
        loss: torch.Tensor = theirs(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=inputs.labels).loss
        return loss

    cases: dict[str, Case] = {
        "ours": client.local_update,
        "baseline": lambda: official.step(weights, official_loss, 1, 5e-4, 1e-7),
        "limit": lambda: [forward(client.model, inputs) for _ in range(2 * directions * steps)],
    }
    target = TARGETS[config.family]
    repeats = options.repeats if target else options.slow_repeats
    seconds = alternate(cases, min(repeats, size.repeats(options)), options.device, options.clock)
    conditions += f", {steps} steps a measurement"
    if directions > 1:
        conditions += f", {directions} directions a step; baseline scaled from 1, limit is {2 * directions} passes"
    return Row(
        name,
        "ms/step",
        1e3 * seconds["ours"] / steps,
        1e3 * seconds["baseline"] * directions,
        1e3 * seconds["limit"] / steps,
        conditions,
        at_most_of_limit=target,
    )
