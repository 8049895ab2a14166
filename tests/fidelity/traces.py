"""The recorded runs of the official codes as typed objects; where they come from: reference/README.md in the shared folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
MODEL = Path("models") / "stories260K"
DATA = Path("data") / "dolly_parity.jsonl"


@dataclass(frozen=True)
class Step:
    """One local step. `loss` is that of the official code's log: FedKSeed L(w + eps z), Ferret L(w) before the step.

    `seed` (a literal candidate) and `scalar` are FedKSeed's only.
    """

    row: int
    loss: float
    seed: int = 0
    scalar: float = 0.0


@dataclass(frozen=True)
class Recording:
    """One run. Rounds count from 1, clients from 0; rows number the lines of DATA.

    Attributes:
        config: the official argument names.
        partition: rows of each client; heldout: rows of the evaluation.
        schedule: clients of each round, in order of training.
        candidates: the K literal seeds.
        evaluations: held-out loss (mean over samples) before round 1 and after each round.
        train_losses: of each round, by the order of `schedule`.
        step_norms: L2 norm of the model's change in each round.
        steps: by (round, client), of the rounds that were traced.
    """

    config: dict[str, Any]
    partition: tuple[tuple[int, ...], ...]
    heldout: tuple[int, ...]
    schedule: tuple[tuple[int, ...], ...]
    candidates: tuple[int, ...]
    evaluations: tuple[float, ...]
    train_losses: tuple[tuple[float, ...], ...]
    step_norms: tuple[float, ...]
    steps: dict[tuple[int, int], tuple[Step, ...]]

    @property
    def rounds(self) -> int:
        return len(self.schedule)

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Literal seed -> its place in the pool."""
        return {seed: number for number, seed in enumerate(self.candidates)}


@dataclass(frozen=True)
class FerretRecording(Recording):
    """Ferret's run, and what it has of its own.

    Attributes:
        group_names, group_sizes: tensors and elements of each group.
        delta_norms: by (round, client), norm of each group's local update.
        coordinates: by (round, client), float32 [K, groups] as sent: zero where a seed was not chosen.
    """

    group_names: tuple[tuple[str, ...], ...]
    group_sizes: tuple[int, ...]
    delta_norms: dict[tuple[int, int], tuple[float, ...]]
    coordinates: dict[tuple[int, int], F32]


def fedkseed(shared: Path) -> Recording:
    """FedKSeed, 16 rounds, every step."""
    raw = _read(shared, "fedkseed_official.json")
    assert raw["trace_columns"] == ["round", "client", "row", "seed", "loss_at_theta_plus_eps_z", "scalar_gradient"]
    steps: dict[tuple[int, int], list[Step]] = {}
    for round, client, row, seed, loss, scalar in raw["trace"]:
        steps.setdefault((round, client), []).append(Step(row, loss, seed, scalar))
    return Recording(**_common(raw), steps={key: tuple(value) for key, value in steps.items()})


def ferret(shared: Path) -> FerretRecording:
    """Ferret, 12 rounds; steps, norms and coordinates of the first two."""
    raw = _read(shared, "ferret_official.json")
    assert raw["trace_columns"] == ["round", "client", "row", "loss_before_step"]
    steps: dict[tuple[int, int], list[Step]] = {}
    for round, client, row, loss in raw["trace"]:
        steps.setdefault((round, client), []).append(Step(row, loss))
    with np.load(shared / "reference" / "ferret_official_coords.npz") as arrays:
        coordinates = {key: arrays[f"round{key[0]}_client{key[1]}_coordinates"] for key in steps}
    return FerretRecording(
        **_common(raw),
        steps={key: tuple(value) for key, value in steps.items()},
        group_names=tuple(map(tuple, raw["group_names"])),
        group_sizes=tuple(raw["group_sizes"]),
        delta_norms={(r, c): tuple(raw["delta_norms"][f"round{r}_client{c}"]) for r, c in steps},
        coordinates=coordinates,
    )


def _read(shared: Path, name: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((shared / "reference" / name).read_text(encoding="utf-8"))
    return raw


def _common(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": raw["config"],
        "partition": tuple(map(tuple, raw["partition"]["clients"])),
        "heldout": tuple(raw["partition"]["eval"]),
        "schedule": tuple(map(tuple, raw["schedule"])),
        "candidates": tuple(raw["candidate_seeds"]),
        "evaluations": tuple(raw["eval_curve"]),
        "train_losses": tuple(map(tuple, raw["train_loss"])),
        "step_norms": tuple(raw["global_step_norm"]),
    }
