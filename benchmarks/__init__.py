"""Ours against the loops of the official codes and against the machine's own limits, alternated in one process.

`python -m benchmarks NAME` with NAME one of add, combine, project, step, first-order, memory, dtype, all. RESULTS.md has a run.
"""
