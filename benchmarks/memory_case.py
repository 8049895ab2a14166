"""One case of the memory benchmark in this process.

    python -m benchmarks.memory_case CASE FOLDER TOKENS DEVICE THREADS K DTYPE

The case runs first on the embedded model, which loads every library and compiles every kernel, then on the model of the
folder; what the second run needs at its peak beyond what is resident between the two is printed, in MB.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import official
from benchmarks.models import Client, batch, forward, sample
from fedtune.config import RunConfig
from fedtune.models import load_model

STEPS = 2
OFFICIAL_SEEDS = 2  # of the official projection: memory does not depend on their number


def inference(config: RunConfig, vocabulary: int) -> None:
    """Two forward passes."""
    lm = load_model(config)
    inputs = batch(config.max_length, vocabulary).to(lm.device)
    for _ in range(STEPS):
        forward(lm.model, inputs)


def fedkseed(config: RunConfig, vocabulary: int) -> None:
    """A round of our FedKSeed client: the model of the round from base and coefficients, then local steps."""
    Client(config, (sample(config.max_length, vocabulary),)).round()


def ferret(config: RunConfig, vocabulary: int) -> None:
    """A round of our Ferret client."""
    Client(config.replace(algorithm="ferret"), (sample(config.max_length, vocabulary),)).round()


@torch.no_grad()
def official_fedkseed(config: RunConfig, vocabulary: int) -> None:
    """The official FedKSeed client: w0 is kept, since the model is rebuilt from it each round; two seeds, then local steps."""
    lm = load_model(config)
    inputs = batch(config.max_length, vocabulary).to(lm.device)
    weights = list(lm.model.parameters())
    start = [weight.detach().clone() for weight in weights]
    for seed in range(STEPS):
        official.update(weights, seed, 1e-4, 1e-7)
    for seed in range(STEPS):
        official.step(weights, lambda: forward(lm.model, inputs), seed, 5e-4, 1e-7)
    assert len(start) == len(weights)


def official_ferret(config: RunConfig, vocabulary: int) -> None:
    """The official Ferret client, on copies: the start, all gradients, SGD, and each group's update to be projected."""
    lm = load_model(config)
    inputs = batch(config.max_length, vocabulary).to(lm.device)
    weights = list(lm.model.parameters())
    start = [weight.detach().clone() for weight in weights]
    optimiser = torch.optim.SGD(weights, lr=1e-4)
    for _ in range(STEPS):
        loss = lm.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=inputs.labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        for before, weight in zip(start, weights, strict=True):
            official.project([before.flatten() - weight.data.flatten()], range(OFFICIAL_SEEDS))


CASES: dict[str, Callable[[RunConfig, int], None]] = {
    "inference": inference,
    "fedkseed": fedkseed,
    "ferret": ferret,
    "official-fedkseed": official_fedkseed,
    "official-ferret": official_ferret,
}


def peak(case: str, config: RunConfig) -> float:
    """MB that the case needs at its peak beyond what is resident before it."""
    device = torch.device(config.device)
    CASES[case](config.replace(model="embedded", max_length=32), 256)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        CASES[case](config, sys.maxsize)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # what the first run freed goes back, so that the second cannot reuse it unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = _status("VmRSS")
    CASES[case](config, sys.maxsize)
    return (_status("VmHWM") - before) / 1e6


def _status(field: str) -> float:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024.0 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: the memory benchmark needs Linux.")


def main() -> None:
    """Run the case that the command line names."""
    case, folder, tokens, device, threads, pool, dtype = sys.argv[1:]
    config = RunConfig(
        model=folder,
        max_length=int(tokens),
        device=device,
        threads=int(threads),
        K=int(pool),
        local_steps=STEPS,
        lr=1e-7,
        dtype=dtype,
    )
    print(peak(case, config))


if __name__ == "__main__":
    main()
