"""Benchmark whole runs against what `fedtune estimate` says of them: seconds and peak memory, each in a process of its own.

The models are random, in bfloat16, up to 1.1 billion parameters. For each size also the memory of one client's round against
the formula of `estimate --meta`, which for larger models is all that there is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Options, Row
from benchmarks.memory import ROOT, peak
from benchmarks.models import SIZES, models, save_random

METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedkseed": {"K": 1024, "lr": 1e-7},
    "ferret": {"K": 4096, "lr": 1e-7, "pool_every": 1},
    "lora": {"lr": 1e-7},
    "fedavg": {"lr": 1e-7, "keep_updates": False},
}
FORMULAS = {"fedkseed": "zeroth_order", "ferret": "first_order"}
"""What `estimate --meta` calls the memory of a client of each."""
WHOLE_WEIGHTS = ("fedavg",)
MOST_WEIGHTS = 500_000_000  # of a model whose weights are sent as a whole: a round of more writes tens of gigabytes
TOKENS = 128  # of the longest sample
ROUNDS, CLIENTS, STEPS = 2, 2, 10
MEMORY_TARGET, TIME_TARGET = 1.15, 1.25
"""Of what `estimate` says: at most so many times."""


def whole(options: Options) -> Iterator[Row]:
    """Seconds and MB of a run of two rounds by size and method, the estimate as the limit; MB of a client, the formula."""
    for name, size in models(options, tuple(SIZES)).items():
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            parameters = save_random(size, model, torch.bfloat16)
            conditions = f"{parameters / 1e6:,.0f} M parameters in bfloat16, {TOKENS} tokens at most"
            for method, settings in METHODS.items():
                if options.only not in f"{method}-{name}" or (method in WHOLE_WEIGHTS and parameters > MOST_WEIGHTS):
                    continue
                if method == "lora" and find_spec("peft") is None:
                    yield Row(f"whole.seconds-{method}-{name}", "s", None, None, None, "skipped: peft is not installed")
                    continue
                preset = Path(folder) / f"{method}.toml"
                preset.write_text(_preset(model, method, settings, options))
                yield from _run(f"{method}-{name}", preset, conditions)
                if method in FORMULAS:
                    formula = _told("estimate", preset, "--meta")["memory"][FORMULAS[method]]
                    measured = peak(method, str(model), TOKENS, options, "bfloat16")
                    told = f"{conditions}, a client's round; limit is the formula of estimate --meta"
                    client = f"whole.client-{method}-{name}"
                    yield Row(client, "MB", measured, None, formula / 1e6, told, at_most_of_limit=MEMORY_TARGET)


def _run(name: str, preset: Path, conditions: str) -> list[Row]:
    """The run, and what was said of it before."""
    expected = _told("estimate", preset)
    done = _told("simulate", preset, "--quiet", "--out", str(preset.with_suffix("")))
    if done["updates_used"] != ROUNDS * CLIENTS:  # a client whose model has another digest than the server's is refused
        raise RuntimeError(f"{name}: {done['updates_used']} of {ROUNDS * CLIENTS} updates were used.")
    told = f"{conditions}, {ROUNDS} rounds of {CLIENTS} clients and {STEPS} steps; limit is what estimate says"
    seconds = Row(f"whole.seconds-{name}", "s", done["seconds"], None, expected["seconds"], told, at_most_of_limit=TIME_TARGET)
    memory = done["peak_memory_bytes"] / 1e6, None, expected["peak"] / 1e6
    return [seconds, Row(f"whole.memory-{name}", "MB", *memory, told, at_most_of_limit=MEMORY_TARGET)]


def _preset(model: Path, method: str, settings: Mapping[str, Any], options: Options) -> str:
    values = {
        "algorithm": method,
        **settings,
        "model": str(model),
        "data": "embedded",
        "dtype": "bfloat16",
        "device": str(options.device),
        "threads": options.threads,
        "max_length": TOKENS,
        "rounds": ROUNDS,
        "clients": 4,
        "clients_per_round": CLIENTS,
        "local_steps": STEPS,
        "eval_samples": 16,
    }
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def _told(command: str, preset: Path, *arguments: str) -> dict[str, Any]:
    """What `fedtune COMMAND PRESET --json` prints, in a fresh process."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "fedtune.cli", command, str(preset), "--json", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
