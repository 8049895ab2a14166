"""How much memory a piece of work needs at most, measured: of the process on the CPU, of the device on CUDA."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fedtune.scratch import trim

_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET = "5"  # what Linux takes for: begin the peak anew


def peak_memory() -> int:
    """Bytes of memory that this process has needed at most so far, libraries included."""
    if _STATUS.exists():
        return _status("VmHWM")  # what getrusage says counts the process that started this one too
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that the process (on CUDA: the device) holds at most while `work` is done, with all that it held before.

    Outside Linux a process cannot ask for its peak since a moment; then it is the peak since its start.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    trim()
    try:
        _REFS.write_text(_RESET)
    except OSError:
        work()
        return peak_memory()
    work()
    return _status("VmHWM")


def memory_now(device: torch.device) -> int:
    """Bytes that the process (on CUDA: the device) holds."""
    return peak_of(lambda: None, device)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
