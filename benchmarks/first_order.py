"""Benchmark first-order: a client's step, and what a round of Ferret costs besides, against a plain PyTorch loop and memory.

A step is that of `first_order.FirstOrder`; in the subspace it is one projection of the gradient and one combination. The
limit is the loop that one would write in PyTorch: the same model, dtype, batch, loss and optimiser, its gradients all at
once, `torch.optim` with its defaults. With a master copy that loop has one too: the optimiser works on it in float32, and
the weights are copied from it.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Case, Options, Row, alternate
from benchmarks.models import Client, Size, models, save_random
from benchmarks.models import sample as sample_of
from fedtune.algorithms import LocalWork
from fedtune.algorithms.change import Change
from fedtune.algorithms.ferret import project
from fedtune.algorithms.first_order import FirstOrder
from fedtune.algorithms.subspace import Gradients, Optimizer
from fedtune.coefficients import leading
from fedtune.config import RunConfig
from fedtune.data.batches import collate
from fedtune.directions import Pool
from fedtune.evaluation import response_loss
from fedtune.resident import Resident

KINDS = (("float32", "nearest"), ("bfloat16", "nearest"), ("bfloat16", "master"))
METHODS = {"ferret": "sgd", "fedavg": "adamw", "lora": "adamw"}
SUBSPACE_KINDS = (("float32", "nearest"), ("bfloat16", "nearest"), ("bfloat16", "stochastic"))
RATE = 1e-7
STEPS = 6
"""Of one measurement: new memory for the state of an optimiser costs no more of a step than in a short round."""
STEP_TARGET, SUBSPACE_TARGET = 1.15, 1.3
"""Of a plain loop: at most so many times; that of the subspace method is one of plain SGD."""
ROUND_TARGET = 5.0
"""Of reading the weights once: at most so many times."""


def first_order(options: Options) -> Iterator[Row]:
    """Milliseconds a step by method, dtype and rounding, and of a round of Ferret without its steps; for each size."""
    for name, size in models(options).items():
        with tempfile.TemporaryDirectory() as folder:
            parameters = save_random(size, Path(folder))
            conditions = f"{parameters / 1e6:.1f} M parameters"
            for method in METHODS:
                for dtype, rule in KINDS:
                    case = f"step.first-order.{method}-{_kind(dtype, rule)}-{name}"
                    if options.only in case:
                        yield _step(case, _config(folder, size, method, dtype, rule, options), size, conditions, options)
            for dtype, rule in SUBSPACE_KINDS:
                case = f"step.subspace-{_kind(dtype, rule)}-{name}"
                if options.only in case:
                    yield _subspace(case, _config(folder, size, "subspace", dtype, rule, options), size, conditions, options)
            for dtype, rule in KINDS:
                config = _config(folder, size, "ferret", dtype, rule, options)
                if options.only in f"round.ferret-{_kind(dtype, rule)}-{name}":
                    yield from _round(f"{_kind(dtype, rule)}-{name}", config, size, conditions, options)


def _kind(dtype: str, rule: str) -> str:
    return dtype if rule == "nearest" else f"{dtype}-{rule}"


def _config(folder: str, size: Size, method: str, dtype: str, rule: str, options: Options) -> RunConfig:
    pool = {"K": options.pool} if method in ("ferret", "subspace") else {}
    return RunConfig(
        model=folder,
        algorithm=method,
        **pool,
        optimizer=METHODS.get(method, ""),
        lr=RATE,
        dtype=dtype,
        update_rounding=rule,
        device=str(options.device),
        threads=options.threads,
        max_length=size.tokens,
    )


# ---------------------------------------------------------------------------------------------------- a step


def _step(name: str, config: RunConfig, size: Size, conditions: str, options: Options) -> Row:
    if config.algorithm == "lora" and find_spec("peft") is None:
        return Row(name, "ms/step", None, None, None, "skipped: peft is not installed")
    work = work_of(config, size)
    plain = plain_loop(work, config)
    count = 1 if options.quick else STEPS

    def ours() -> None:
        with FirstOrder(work, config) as steps:
            for _ in range(count):
                steps.take()

    return _against(name, ours, lambda: plain(count), count, size, f"{conditions}, {config.optimizer}", STEP_TARGET, options)


def _subspace(name: str, config: RunConfig, size: Size, conditions: str, options: Options) -> Row:
    """Steps in the subspace against those of plain SGD with all gradients at once."""
    client = Client(config, (sample_of(size.tokens),))
    work = client.work()
    plain = plain_loop(work, config.replace(algorithm="ferret", optimizer="sgd", update_rounding="nearest"))
    count = 1 if options.quick else STEPS
    moves, counts = client.resident.replica, client.instruction().counts.astype(np.int64)
    wanted = leading(counts, work.directions.pool.size)

    def ours() -> None:
        optimizer = Optimizer(config, moves.scales, counts)
        with Gradients(work, wanted) as gradients:
            for _ in range(count):
                found = gradients.take(1)
                assert found is not None, "the loss is not finite"
                moves.move(optimizer.step(found[1], found[0]))

    said = f"{conditions}, K = {config.K}, against SGD"
    return _against(name, ours, lambda: plain(count), count, size, said, SUBSPACE_TARGET, options)


def _against(
    name: str, ours: Case, plain: Case, count: int, size: Size, conditions: str, target: float, options: Options
) -> Row:
    """So many steps of ours and of a plain loop in turn, as one row: milliseconds a step."""
    cases: dict[str, Case] = {"ours": ours, "plain": plain}
    seconds = alternate(cases, size.repeats(options), options.device, options.clock)
    gc.collect()
    return Row(
        name,
        "ms/step",
        1e3 * seconds["ours"] / count,
        None,
        1e3 * seconds["plain"] / count,
        f"{conditions}, 1 x {size.tokens} tokens; limit is a plain PyTorch loop",
        at_most_of_limit=target,
    )


def work_of(config: RunConfig, size: Size) -> LocalWork:
    """What a client works on, from the base model; nothing is sent, so the directions do not matter."""
    here = Resident(config)
    replica = here.replica
    replica.perturbation.live.begin(config.update_rounding, 1)
    batch = collate([sample_of(size.tokens)], 0).to(here.language_model.device)
    batches: Iterator[object] = iter(lambda: batch, None)
    directions = replica.directions(Pool("hadamard", 1, 1))
    return LocalWork(
        replica.model, replica.weights, response_loss, batches, directions, replica.perturbation, "client", 1,
        replica.start,
    )  # fmt: skip


def plain_loop(work: LocalWork, config: RunConfig) -> Callable[[int], None]:
    """So many steps on the same weights; its optimiser is made anew each time, as ours is, and its master copy is not."""
    wide = config.update_rounding == "master"
    weights = list(work.weights)
    held = [weight.detach().float() for weight in weights] if wide else weights

    def loop(steps: int) -> None:
        made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[config.optimizer]
        optimizer = made(held, lr=config.lr, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = work.loss(work.model, next(work.batches))
            loss.backward()
            float(loss.detach())
            if wide:
                for copy, weight in zip(held, weights, strict=True):
                    copy.grad = weight.grad.float()
                    weight.grad = None
            optimizer.step()
            if wide:
                with torch.no_grad():
                    for copy, weight in zip(held, weights, strict=True):
                        weight.copy_(copy)
        optimizer.zero_grad()

    return loop


# ---------------------------------------------------------------------------------------------------- a round of Ferret


def _round(name: str, config: RunConfig, size: Size, conditions: str, options: Options) -> list[Row]:
    """The rebuild of the model, the projection of the change, and both, against reading the weights once."""
    client = Client(config, (sample_of(size.tokens),))
    work, instruction, replica = client.work(), client.instruction(), client.resident.replica
    change = Change.of(work)

    def rebuild() -> None:
        replica.touch()
        replica.become(client.coefficients())
        work.live.begin(config.update_rounding, 1)

    cases: dict[str, Case] = {
        "rebuild": rebuild,
        "projection": lambda: project(work, change, config, instruction),
        "read": lambda: [weight.detach().sum() for weight in work.weights],
    }
    seconds = alternate(cases, size.repeats(options), options.device, options.clock)
    read = 1e3 * seconds.pop("read")
    gc.collect()
    made = {"rebuild": seconds["rebuild"], "projection": seconds["projection"], "both": sum(seconds.values())}
    return [
        Row(
            f"round.ferret-{part}-{name}",
            "ms/round",
            1e3 * taken,
            None,
            read,
            f"{conditions}, K = {config.K}; limit is reading the weights once",
            at_most_of_limit=ROUND_TARGET,
        )
        for part, taken in made.items()
    ]
