"""Benchmark dtype: does a client train the model that everybody else rebuilds from its scalars?

A FedKSeed client walks some hundred steps on the shared small model. Then the held-out loss of its own weights is compared
with that of the model that the server makes of its scalars. The baseline is the official order of operations (+eps,
-2 eps, +eps in the weights' own dtype), whose server adds the same seeds in that dtype too.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from benchmarks import official
from benchmarks.measure import Options, Row
from fedtune.config import RunConfig
from fedtune.data.batches import client_batches
from fedtune.evaluation import evaluate, response_loss
from fedtune.perturb import RULES
from fedtune.resident import Resident
from fedtune.seeds import Stream
from fedtune.wire import Instruction

TOLERANCE = 0.05  # nats that the two losses may differ by
CLIENT = "client"


def dtype(options: Options) -> list[Row]:
    """|loss of the client's own weights - loss of the rebuilt model|, in nats, for each dtype and rule of rounding."""
    shared = Path(os.environ.get("FEDTUNE_SHARED", "../shared"))
    cases = [("float32", "nearest"), *((name, rule) for name in ("bfloat16", "float16") for rule in RULES)]
    if not (shared / "models" / "stories260K").is_dir():
        reason = f"skipped: no shared model in '{shared}' (FEDTUNE_SHARED)"
        return [Row(_name(*case), "nats", None, None, TOLERANCE, reason) for case in cases]
    return [_row(*case, shared, options) for case in cases]


def _name(dtype: str, rule: str) -> str:
    return f"dtype.{dtype}" if rule == "nearest" else f"dtype.{dtype}-{rule}"


def _row(name: str, rule: str, shared: Path, options: Options) -> Row:
    steps = 2 if options.quick else options.steps
    config = RunConfig(
        model=str(shared / "models" / "stories260K"),
        data=str(shared / "data" / "dolly_parity.jsonl"),
        template="fedkseed",
        holdout_category="open_qa",
        clients=1,
        client_fraction=1.0,
        K=1024,
        lr=3e-5,
        eps=5e-4,
        local_steps=steps,
        eval_samples=8 if options.quick else 0,
        dtype=name,
        update_rounding=rule,
        device=str(options.device),
        threads=options.threads,
    )
    own, rebuilt = _ours(Resident(config), config)
    conditions = f"{steps} steps, K = 1024; loss of client / rebuilt: ours {own:.3f} / {rebuilt:.3f}"
    theirs = None
    if rule == "nearest":  # the official code has no other
        official_own, official_rebuilt = _official(Resident(config), config)
        theirs = abs(official_own - official_rebuilt)
        conditions += f", official {official_own:.3f} / {official_rebuilt:.3f}"
    return Row(_name(name, rule), "nats", abs(own - rebuilt), theirs, TOLERANCE, conditions, at_most_of_limit=1.0)


def _ours(here: Resident, config: RunConfig) -> tuple[float, float]:
    algorithm, replica = here.algorithm, here.replica
    state = algorithm.start(config, replica.layout)
    published = state.published(config.coefficient_bits)
    digest = published.digest(replica.fingerprint)
    weights = algorithm.draw_weights(state)
    instruction = Instruction(1, replica.fingerprint, replica.layout.digest, digest, 0, published.pools, weights)
    work = here.work(config, CLIENT, here.data.clients[0], 1, published)
    update = algorithm.local_update(work, config, instruction)
    own = _heldout(here, config)
    after = algorithm.aggregate(state, {CLIENT: update}, config, replica.layout)
    replica.become(after.published(config.coefficient_bits))
    return own, _heldout(here, config)


@torch.no_grad()
def _official(here: Resident, config: RunConfig) -> tuple[float, float]:
    """The same model, batches and number of steps with the official step; then the official rebuild from w0."""
    lm = here.language_model
    weights = list(lm.model.parameters())
    start = [weight.detach().clone() for weight in weights]
    stream = Stream(config.seed, "batches", 1, CLIENT)
    batches = client_batches(here.data.clients[0], 1, stream, lm.tokenizer.pad_token_id)
    accumulated: dict[int, float] = {}
    for seed in Stream(config.seed, "steps", 1, CLIENT).below(config.K, config.local_steps).tolist():
        inputs = next(batches).to(lm.device)
        gradient = official.step(weights, lambda inputs=inputs: response_loss(lm.model, inputs), seed, config.eps, config.lr)
        if math.isfinite(gradient):
            accumulated[seed] = accumulated.get(seed, 0.0) + gradient
    own = _heldout(here, config)
    for weight, before in zip(weights, start, strict=True):
        weight.data = before
    for seed, gradient in accumulated.items():
        official.update(weights, seed, gradient, config.lr)
    return own, _heldout(here, config)


def _heldout(here: Resident, config: RunConfig) -> float:
    return evaluate(here.language_model, here.data.heldout, config.eval_batch_size).loss
