"""Benchmark memory: the peak memory of a client's round, each in a process of its own (memory_case.py).

On the CPU it is the largest resident set since the imports (VmHWM, which counts mapped files too) less what was resident
then; on a GPU the largest amount that torch had allocated.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Options, Row
from benchmarks.models import MEMORY, QUICK, save_random

ROOT = Path(__file__).parents[1]


def memory(options: Options) -> list[Row]:
    """MB over the imports: our clients, the official ones, and inference alone (the limit)."""
    size = QUICK if options.quick else MEMORY
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_random(size, Path(folder))
        conditions = f"{parameters / 1e6:.1f} M float32 parameters ({parameters * 4 / 1e6:.0f} MB), 1 x {size.tokens} tokens"

        def of(case: str) -> float:
            return peak(case, folder, size.tokens, options)

        inference = of("inference")
        return [
            Row(
                "memory.fedkseed",
                "MB",
                of("fedkseed"),
                of("official-fedkseed"),
                inference,
                f"{conditions}, 2 local steps; baseline keeps w0 beside the weights",
                at_most_of_limit=1.15,
            ),
            Row(
                "memory.ferret",
                "MB",
                of("ferret"),
                of("official-ferret"),
                inference,
                f"{conditions}, 2 SGD steps; baseline keeps a copy of the start and all gradients",
                at_least_below_baseline=1 / 0.6,
            ),
        ]


def peak(case: str, folder: str, tokens: int, options: Options, dtype: str = "float32") -> float:
    """MB of one case in a fresh process."""
    arguments = [case, folder, str(tokens), str(options.device), str(options.threads), str(options.pool), dtype]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_case", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return float(done.stdout.split()[-1])
