"""Benchmark step: a FedKSeed local step on a random Llama against the official step and against two plain forward passes.

Both run from the same folder on models of their own. The official code computes the logits of all positions; ours, and the
plain passes, those of the response only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks import official
from benchmarks.measure import Case, Options, Row, alternate
from benchmarks.models import QUICK, STEP, VOCABULARY, Client, batch, forward, sample, save_random
from fedtune.config import RunConfig
from fedtune.models import load_model

STEPS = 4  # local steps of ours in one measurement
TARGETS = {"hadamard": 1.25, "lowrank": 1.1, "rademacher": None, "gaussian": None}
"""By family: at most so many times two plain forward passes."""


def step(options: Options) -> list[Row]:
    """Milliseconds a step, for each family that has kernels."""
    size = QUICK if options.quick else STEP
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_random(size, Path(folder))
        config = RunConfig(
            model=folder,
            K=options.pool,
            local_steps=STEPS,
            lr=1e-7,
            eps=5e-4,
            device=str(options.device),
            threads=options.threads,
            max_length=size.tokens,
        )
        conditions = f"{parameters / 1e6:.1f} M parameters, 1 x {size.tokens} tokens, float32, {STEPS} steps a measurement"
        return [_row(family, config, size.tokens, conditions, options) for family in TARGETS]


def _row(family: str, config: RunConfig, tokens: int, conditions: str, options: Options) -> Row:
    client = Client(config.replace(family=family), (sample(tokens, VOCABULARY),))
    inputs = batch(tokens).to(client.device)
    theirs = load_model(config).model
    weights = list(theirs.parameters())

    @torch.no_grad()
    def official_loss() -> torch.Tensor:
        loss: torch.Tensor = theirs(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=inputs.labels).loss
        return loss

    cases: dict[str, Case] = {
        "ours": client.local_update,
        "baseline": lambda: official.step(weights, official_loss, 1, 5e-4, 1e-7),
        "limit": lambda: [forward(client.model, inputs) for _ in range(2 * STEPS)],
    }
    seconds = alternate(cases, options.repeats if TARGETS[family] else options.slow_repeats, options.device)
    return Row(
        f"step.{family}",
        "ms/step",
        1e3 * seconds["ours"] / STEPS,
        1e3 * seconds["baseline"],
        1e3 * seconds["limit"] / STEPS,
        conditions,
        at_most_of_limit=TARGETS[family],
    )
