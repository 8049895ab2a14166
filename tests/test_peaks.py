"""What is said of a process's memory is its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fedtune.peaks import memory_now, peak_memory, peak_of

CPU = torch.device("cpu")
LARGE = 200 << 20  # bytes


def allocate() -> None:
    assert bytearray(LARGE)[::4096].count(0) == LARGE // 4096


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot ask for its peak since a moment")
def test_the_peak_of_a_piece_of_work_is_not_that_of_one_before() -> None:
    allocate()
    before = memory_now(CPU)
    assert peak_of(allocate, CPU) >= before + 0.9 * LARGE
    assert peak_of(lambda: None, CPU) <= before + 0.2 * LARGE


def test_the_process_that_starts_another_one_is_not_counted() -> None:
    kept = bytearray(b"x") * (2 * LARGE)
    code = "from fedtune.peaks import peak_memory; print(peak_memory())"
    found = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    allocated = subprocess.run(
        [sys.executable, "-c", f"kept = bytearray(b'x') * {LARGE}; {code}"], capture_output=True, text=True, check=True
    )
    assert peak_memory() > len(kept) > found
    assert int(allocated.stdout) > found + 0.9 * LARGE
