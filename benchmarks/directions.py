"""Benchmarks add, combine and project: directions over bare float32 tensors, in nanoseconds per parameter.

The official loops over K seeds are run over SAMPLE of them and their time is multiplied by K / SAMPLE: all of them would
take hours. The limit is an in-place scale of the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks import limits, official
from benchmarks.measure import Case, Options, Row, alternate
from fedtune.directions import Directions, Pool
from fedtune.directions.base import F32
from fedtune.layout import BlockRule, Layout

SAMPLE = 2
SHRINK = 16  # families whose cost grows with K are measured on this part of the memory


@dataclass(frozen=True)
class _Targets:
    of_limit: float | None = None
    below_baseline: float | None = None


NONE = _Targets()
ADD = _Targets(2.0, 30.0)
ALL_SEEDS = _Targets(10.0, 20_000.0)
GAUSSIAN = _Targets(None, 10.0)


def add(options: Options) -> list[Row]:
    """w += c z_k, for one seed, against FedKSeed's axpy."""
    tensors = limits.weights(options.elements, options.device)
    rows = []
    for family in ("hadamard", "rademacher", "gaussian"):
        directions = _directions(tensors, family, options.pool)
        cases: dict[str, Case] = {
            "ours": lambda directions=directions: directions.add(tensors, 1, 1e-7),
            "baseline": lambda: official.update(tensors, 1, 1e-4, 1e-3),
            "limit": lambda: limits.scale(tensors),
        }
        seconds = alternate(cases, options.slow_repeats if family != "hadamard" else options.repeats, options.device)
        rows.append(_row(f"add.{family}", options.elements, seconds, 1.0, ADD if family == "hadamard" else NONE, "one seed"))
    return rows


def combine(options: Options) -> list[Row]:
    """w += sum_k C_k z_k over the whole pool, against FedKSeed's rebuild (one block) and Ferret's (a block a tensor)."""
    rows = []
    small = options.elements if options.quick else options.elements // SHRINK
    for family, elements, targets in (
        ("hadamard", options.elements, ALL_SEEDS),
        ("rademacher", small, NONE),
        ("gaussian", small, GAUSSIAN),
    ):
        tensors = limits.weights(elements, options.device)
        directions = _directions(tensors, family, options.pool)
        values = _coefficients(1, options.pool)
        cases: dict[str, Case] = {
            "ours": lambda t=tensors, d=directions, v=values: d.combine(t, t, v),
            "baseline": lambda t=tensors: [official.update(t, seed, 1e-4, 1e-3) for seed in range(SAMPLE)],
            "limit": lambda t=tensors: limits.scale(t),
        }
        rows.append(_all_seeds(f"combine.{family}", elements, cases, options, targets, "one block, FedKSeed's rebuild"))
    tensors = limits.weights(options.elements, options.device)
    directions = _directions(tensors, "hadamard", options.pool, "tensor")
    table, some = _coefficients(len(tensors), options.pool), torch.full((len(tensors), SAMPLE), 1e-4)
    cases = {
        "ours": lambda: directions.combine(tensors, tensors, table),
        "baseline": lambda: official.rebuild(tensors, range(SAMPLE), some, 1e-3),
        "limit": lambda: limits.scale(tensors),
    }
    conditions = "a block a tensor, Ferret's rebuild"
    rows.append(_all_seeds("combine.hadamard-blocks", options.elements, cases, options, ALL_SEEDS, conditions))
    return rows


def project(options: Options) -> list[Row]:
    """<z_k, delta> for all seeds, a block a tensor, against Ferret's projection of every seed."""
    rows = []
    small = options.elements if options.quick else options.elements // SHRINK
    for family, elements, targets in (
        ("hadamard", options.elements, ALL_SEEDS),
        ("rademacher", small, NONE),
        ("gaussian", small, GAUSSIAN),
    ):
        deltas = limits.weights(elements, options.device)
        flat = [delta.flatten() for delta in deltas]
        directions = _directions(deltas, family, options.pool, "tensor")
        cases: dict[str, Case] = {
            "ours": lambda t=deltas, d=directions: d.project(enumerate(t)),
            "baseline": lambda t=flat: official.project(t, range(SAMPLE)),
            "limit": lambda t=deltas: limits.scale(t),
        }
        conditions = "a block a tensor, Ferret's projection"
        rows.append(_all_seeds(f"project.{family}", elements, cases, options, targets, conditions))
    return rows


def _all_seeds(name: str, elements: int, cases: dict[str, Case], options: Options, targets: _Targets, what: str) -> Row:
    repeats = options.repeats if "hadamard" in name else options.slow_repeats
    seconds = alternate(cases, repeats, options.device)
    conditions = f"K = {options.pool}, {what}; baseline scaled from {SAMPLE} seeds"
    return _row(name, elements, seconds, options.pool / SAMPLE, targets, conditions)


def _row(name: str, elements: int, seconds: dict[str, float], scaled: float, targets: _Targets, conditions: str) -> Row:
    unit = 1e9 / elements
    return Row(
        name,
        "ns/parameter",
        seconds["ours"] * unit,
        seconds["baseline"] * scaled * unit,
        seconds["limit"] * unit,
        f"{elements / 2**20:g} Mi float32, {conditions}",
        targets.of_limit,
        targets.below_baseline,
    )


def _directions(tensors: list[Tensor], family: str, pool: int, blocks: BlockRule = "one") -> Directions:
    shapes = [(f"weight {number}", tuple(tensor.shape)) for number, tensor in enumerate(tensors)]
    return Directions(Layout.from_shapes(shapes, blocks), Pool(family, 1, pool))


def _coefficients(blocks: int, pool: int) -> F32:
    """float32 [blocks, pool], none of them zero, on a grid."""
    signs = np.where(np.arange(blocks * pool) % 3 == 0, -1.0, 1.0).reshape(blocks, pool)
    return np.asarray(signs * 2.0**-24, dtype=np.float32)
